"""Converts an original SAN checkpoint: `python conversion/convert_san.py --help`."""

from ov_segmentation.conversion_cli import run
from ov_segmentation.models.san.convert_san import VARIANTS, convert, map_keys

__all__ = ["VARIANTS", "convert", "map_keys"]

if __name__ == "__main__":
    run("san")
