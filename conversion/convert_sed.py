"""Converts an original SED checkpoint: `python conversion/convert_sed.py --help`."""

from ov_segmentation.conversion_cli import run
from ov_segmentation.models.sed.convert_sed import VARIANTS, convert, map_keys

__all__ = ["VARIANTS", "convert", "map_keys"]

if __name__ == "__main__":
    run("sed")
