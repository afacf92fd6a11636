"""Draws docs/methods.png and docs/maps.png: `python tools/draw_pictures.py [METHOD=CHECKPOINT ...]`.

All bundled methods on the bundled scene, side by side, and what they can show of their insides (`output_maps=True`):
SAN's attention biases, SED's classes that survive rejection, ESC-Net's blocks, DeOP's heatmaps. `METHOD=CHECKPOINT`
takes another checkpoint than the bundled one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples import demo  # noqa: E402  the bundled checkpoints
from ov_segmentation.auto import METHODS  # noqa: E402
from ov_segmentation.image_reading import read_image  # noqa: E402
from ov_segmentation.method_facts import FACTS  # noqa: E402
from ov_segmentation.visualization import color_palette, colored_map  # noqa: E402

SIDE = 192
GAP = 8
TITLE = 22
THING = "blue plain circle"
TOP_K = 1
# dark blue, violet, orange, pale yellow: equal steps of lightness
HEAT = np.array([[10, 10, 60], [110, 30, 130], [235, 110, 60], [255, 250, 190]], dtype=float)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="METHOD=CHECKPOINT", help="other than the bundled ones")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the pictures")
    options = parser.parse_args(arguments)
    given = dict(text.split("=", 1) for text in options.checkpoints)
    if unknown := set(given) - {method.model_type for method in METHODS}:
        sys.exit(f"draw_pictures.py: there are no methods {sorted(unknown)}.")
    bundled = {method: str(demo.ASSETS / folder) for method, folder in demo.CHECKPOINTS.items()}
    pipelines = {
        method.model_type: demo.load_checkpoint({**bundled, **given}[method.model_type])
        for method in METHODS
        if method.model_type in {**bundled, **given}
    }
    picture, _ = read_image(str(demo.ASSETS / "scene.png"))
    picture = Image.fromarray(np.asarray(picture))
    methods_picture(pipelines, picture).save(options.output / "methods.png")
    maps_picture(pipelines, picture).save(options.output / "maps.png")


def methods_picture(pipelines: dict[str, Any], picture: Image.Image) -> Image.Image:
    """The scene, every method's label map, and the names."""
    labels = [name.strip() for name in demo.LABELS.split(",")]
    tiles, present = [("the scene", enlarged(picture))], set()
    for method, segment in pipelines.items():
        result = segment(picture, candidate_labels=labels, output_type="map")["segmentation"]
        present |= set(np.unique(result).tolist())
        tiles.append((FACTS[method].title, enlarged(colored_map(result, color_palette(len(labels))))))
    sheet = in_rows([tiles[start : start + 4] for start in range(0, len(tiles), 4)])
    return below(sheet, [(labels[k], tuple(color_palette(len(labels))[k].tolist())) for k in sorted(present)])


def maps_picture(pipelines: dict[str, Any], picture: Image.Image) -> Image.Image:
    """A row of maps for every method that has them."""
    labels = [name.strip() for name in demo.LABELS.split(",")]
    rows = []
    for method, segment in pipelines.items():
        draw = ROWS.get(method)
        if draw is not None and (row := draw(segment.model, segment.processor, picture, labels)):
            rows.append([("the scene", enlarged(picture)), *row])
    return in_rows(rows)


@torch.no_grad()
def outputs_of(model: Any, processor: Any, picture: Image.Image, labels: list[str], **options: Any) -> Any:
    """The model's outputs with maps."""
    inputs = processor(images=picture, text=labels, return_tensors="pt")
    return model(**inputs, output_maps=True, **options)


def san_row(model: Any, processor: Any, picture: Image.Image, labels: list[str]) -> list[tuple[str, Image.Image]]:
    """The attention biases of the query that is most certain of the thing, one map for each of CLIP's heads."""
    outputs = outputs_of(model, processor, picture, labels)
    query = outputs.class_queries_scores[0, :, labels.index(THING)].argmax()
    biases = outputs.maps["attention_bias"][0, 0, :, query]
    return [(f"SAN, bias of head {head}", heat(bias)) for head, bias in enumerate(biases, start=1)]


def sed_row(model: Any, processor: Any, picture: Image.Image, labels: list[str]) -> list[tuple[str, Image.Image]]:
    """Early logits of the thing, if it is kept, and of the most likely classes, and which of all classes are left."""
    outputs = outputs_of(model, processor, picture, labels, rejection_top_k=TOP_K)
    early, kept = outputs.maps["auxiliary_logits_0"][0].sigmoid(), outputs.kept_classes[0]
    order = early.amax((1, 2)).argsort(descending=True)
    left, gone = ([int(index) for index in order if bool(kept[index]) is wanted] for wanted in (True, False))
    left.sort(key=lambda index: labels[index] != THING)
    shown = [*left[:2], *gone[:1]]
    tiles = [(f"SED, {'kept' if kept[index] else 'rejected'}: {labels[index]}", heat(early[index])) for index in shown]
    return [*tiles, (f"SED, {int(kept.sum())} of {len(labels)} kept", checklist(labels, kept.tolist()))]


def esc_net_row(model: Any, processor: Any, picture: Image.Image, labels: list[str]) -> list[tuple[str, Image.Image]]:
    """The correlation with the thing's name, and the class's features after each block."""
    maps = outputs_of(model, processor, picture, labels).maps
    thing = labels.index(THING)
    tiles = [("ESC-Net, correlation", heat(maps["correlation"][0, thing]))]
    blocks = sorted(name for name in maps if name.startswith("activation_"))
    return tiles + [(f"ESC-Net, block {name.split('_')[1]}", heat(maps[name][0, thing])) for name in blocks][:4]


def deop_row(model: Any, processor: Any, picture: Image.Image, labels: list[str]) -> list[tuple[str, Image.Image]]:
    """The heatmaps with which the query that is most certain of the thing pools CLIP's map; none without queries."""
    outputs = outputs_of(model, processor, picture, labels)
    if "heatmaps" not in outputs.maps:
        return []
    query = outputs.class_queries_scores[0, :, labels.index(THING)].argmax()
    heatmaps = outputs.maps["heatmaps"][0, :, query]
    return [(f"DeOP, anchor of head {head}", heat(one)) for head, one in enumerate(heatmaps[:4], start=1)]


ROWS = {"san": san_row, "sed": sed_row, "esc_net": esc_net_row, "deop": deop_row}


def enlarged(picture: Image.Image) -> Image.Image:
    """At the size of a tile."""
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)


def heat(values: torch.Tensor) -> Image.Image:
    """A map `[h, w]` in colours, from its lowest value to its highest."""
    values = values.float().numpy()
    scaled = (values - values.min()) / max(float(np.ptp(values)), 1e-6) * (len(HEAT) - 1)
    colours = np.stack([np.interp(scaled, range(len(HEAT)), channel) for channel in HEAT.T], axis=-1)
    return enlarged(Image.fromarray(colours.round().astype(np.uint8)))


def checklist(names: list[str], marks: list[bool]) -> Image.Image:
    """Names, those without a mark in gray."""
    tile = Image.new("RGB", (SIDE, SIDE), "white")
    draw, step = ImageDraw.Draw(tile), SIDE // len(names)
    for index, (name, marked) in enumerate(zip(names, marks, strict=True)):
        draw.text((4, index * step), name, "black" if marked else "#bbbbbb", ImageFont.load_default(step - 1))
    return tile


def in_rows(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Tiles with titles above them, on a white sheet."""
    width = max(len(row) for row in rows) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + TITLE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = number * (SIDE + TITLE + GAP)
        for column, (title, tile) in enumerate(row):
            left = GAP + column * (SIDE + GAP)
            font = ImageFont.load_default(14)
            while font.getlength(title) > SIDE:
                font = ImageFont.load_default(font.size - 1)
            draw.text((left, top + 3), title, "black", font)
            sheet.paste(tile, (left, top + TITLE))
    return sheet


def below(sheet: Image.Image, entries: list[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """A legend of four columns under a sheet."""
    rows = -(-len(entries) // 4)
    result = Image.new("RGB", (sheet.width, sheet.height + rows * TITLE + GAP), "white")
    result.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(result)
    for number, (name, colour) in enumerate(entries):
        left, top = GAP + number % 4 * (SIDE + GAP), sheet.height + number // 4 * TITLE
        draw.rectangle((left, top, left + 14, top + 14), fill=colour, outline="black")
        draw.text((left + 20, top), name, "black", ImageFont.load_default(13))
    return result


if __name__ == "__main__":
    main()
