"""Converts an original OVSeg or SimBaseline checkpoint: `python conversion/convert_ovseg.py --help`."""

from ov_segmentation.conversion_cli import run
from ov_segmentation.models.ovseg.convert_ovseg import VARIANTS, convert, map_keys

__all__ = ["VARIANTS", "convert", "map_keys"]

if __name__ == "__main__":
    run("ovseg")
