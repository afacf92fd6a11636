"""Converts an original DeOP checkpoint: `python conversion/convert_deop.py --help`."""

from ov_segmentation.conversion_cli import run
from ov_segmentation.models.deop.convert_deop import VARIANTS, convert, map_keys

__all__ = ["VARIANTS", "convert", "map_keys"]

if __name__ == "__main__":
    run("deop")
