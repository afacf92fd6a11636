"""Converts an original CAT-Seg checkpoint: `python conversion/convert_cat_seg.py --help`."""

from ov_segmentation.conversion_cli import run
from ov_segmentation.models.cat_seg.convert_cat_seg import VARIANTS, convert, map_keys

__all__ = ["VARIANTS", "convert", "map_keys"]

if __name__ == "__main__":
    run("cat_seg")
