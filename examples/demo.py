"""Segment a picture with the checkpoint that comes with the project: `make demo`, or `python examples/demo.py`.

No network is needed. The checkpoint is a small SAN trained on synthetic scenes of coloured, patterned shapes
(examples/recipes/san_scenes.yaml): it knows the words of those scenes, and compositions of them that it never saw.
It knows nothing about photographs: for those, convert or load a checkpoint of a published method.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

import ov_segmentation  # noqa: F401  registers the task
from ov_segmentation.image_reading import read_image
from ov_segmentation.visualization import overlay

ASSETS = Path(__file__).resolve().parent.parent / "assets"
LABELS = (ASSETS / "scene_labels.txt").read_text(encoding="utf-8").strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, segment, print a table and write an overlay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default=str(ASSETS / "scene.png"), help="path, URL or data URI")
    parser.add_argument("--labels", default=LABELS, help="class names, separated by commas")
    parser.add_argument("--model", default=str(ASSETS / "san_scenes"), help="folder or Hub id of a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="where the overlay goes")
    options = parser.parse_args(arguments)
    segment = pipeline("open-vocabulary-segmentation", model=options.model, dtype=torch.float32)
    picture, _ = read_image(options.picture)
    result = segment(picture, candidate_labels=options.labels, output_type="map", return_confidence=True)
    print(table(result))
    drawn = overlay(enlarged(picture), enlarged(result["segmentation"]), result["labels"])
    side_by_side(Image.fromarray(enlarged(picture)), drawn).save(options.output)
    print(f"\nPicture and overlay: {options.output}")


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


def table(result: dict) -> str:
    """The labels that own pixels, largest first: name, share of the picture, mean confidence."""
    pixels, total = result["segmentation"], result["segmentation"].size
    rows = [
        (label, np.count_nonzero(pixels == index) / total, score)
        for index, (label, score) in enumerate(zip(result["labels"], result["scores"], strict=True))
    ]
    shown = sorted((row for row in rows if row[1]), key=lambda row: -row[1])
    width = max(len("label"), *(len(label) for label, _, _ in shown))
    lines = [f"{'label':{width}}    area  confidence"]
    return "\n".join(lines + [f"{label:{width}}  {area:6.1%}  {score:10.2f}" for label, area, score in shown])


if __name__ == "__main__":
    main()
