"""Segment a picture with a checkpoint that comes with the project: `make demo METHOD=sed`, `python examples/demo.py`.

No network is needed. The checkpoints are small models trained on synthetic scenes of coloured, patterned shapes
(examples/recipes/, named as the folders in assets/): they know the words of those scenes, and compositions of them that
they never saw. They know nothing about photographs: for those, convert or load a checkpoint of a published method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

import ov_segmentation  # noqa: F401  registers the task
from ov_segmentation.cli import table
from ov_segmentation.download_errors import loading_explained
from ov_segmentation.image_reading import read_image
from ov_segmentation.visualization import overlay

ASSETS = Path(__file__).resolve().parent.parent / "assets"
FOLDERS = {
    "san": "san_scenes",
    "ovseg": "ovseg_scenes_small",
    "deop": "deop_scenes_small",
    "sed": "sed_scenes",
    "cat_seg": "cat_seg_scenes",
    "esc_net": "esc_net_scenes",
}
CHECKPOINTS = {method: folder for method, folder in FOLDERS.items() if (ASSETS / folder).is_dir()}
"""Method -> folder of its bundled checkpoint in assets/, of those that there are."""
LABELS = (ASSETS / "scene_labels.txt").read_text(encoding="utf-8").strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, segment, print a table and write an overlay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default=str(ASSETS / "scene.png"), help="path, URL or data URI")
    parser.add_argument("--labels", default=LABELS, help="class names, separated by commas")
    parser.add_argument("--method", choices=CHECKPOINTS, default="san", help="whose bundled checkpoint")
    parser.add_argument("--model", help="folder or Hub id of another checkpoint")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="where the overlay goes")
    options = parser.parse_args(arguments)
    try:
        picture, _ = read_image(options.picture)
        segment = load(options.method) if options.model is None else load_checkpoint(options.model)
        result = segment(picture, candidate_labels=options.labels, output_type="map", return_confidence=True)
        print(table(result))
        drawn = overlay(enlarged(picture), enlarged(result["segmentation"]), result["labels"])
        side_by_side(Image.fromarray(enlarged(picture)), drawn).save(options.output)
    except (OSError, ValueError) as error:
        # the message says what to do; a traceback would bury it
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"\nPicture and overlay: {options.output}")


def load(method: str) -> Any:
    """The pipeline of a method's bundled checkpoint."""
    return load_checkpoint(str(ASSETS / CHECKPOINTS[method]))


def load_checkpoint(source: str) -> Any:
    """The pipeline of a folder or Hub id."""
    with loading_explained(source):
        return pipeline("open-vocabulary-segmentation", model=source, dtype=torch.float32)


def enlarged(pixels: np.ndarray, least: int = 384) -> np.ndarray:
    """A small picture or label map with every pixel repeated, so that there is something to see."""
    factor = max(1, least // min(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures on one white sheet."""
    sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width, 0))
    return sheet


if __name__ == "__main__":
    main()
