"""Small trees in the layout of each official download, with label maps whose prepared form is written down by hand.

Every function makes `count` pictures a split in `root` and returns, by split and file name, the class ids that the
prepared label maps must hold. The pairs (id in the file, prepared id) are the facts sheets', not the package's.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

VOCABULARIES = Path(__file__).parents[1] / "src/ov_segmentation/vocabularies"
HEIGHT, WIDTH, BLOCK = 24, 32, 8
Pairs = list[tuple[int, int]]
Expected = dict[str, dict[str, np.ndarray]]

COCO = [(0, 0), (20, 19), (24, 23), (99, 88), (171, 160), (181, 170), (255, 255), (11, 255), (90, 255)]
COCO_156 = [(0, 0), (20, 255), (21, 19), (181, 155), (255, 255), (11, 255)]
ADE_150 = [(0, 255), (1, 0), (5, 4), (150, 149)]
VOC_20 = [(0, 255), (1, 0), (20, 19), (16, 15), (255, 255)]
VOC_20B = [(0, 20), (1, 0), (20, 19), (16, 15), (255, 255)]
VOC_15 = [(0, 255), (1, 0), (15, 14), (16, 255), (255, 255)]
CONTEXT_459 = [(0, 65535), (1, 0), (300, 299), (431, 430), (459, 458)]
CAMVID = [(0, 0), (10, 10), (11, 11)]


def names(file: str) -> list[str]:
    return json.loads((VOCABULARIES / f"{file}.json").read_text())


def context_59() -> Pairs:
    """By name: the two lists spell one class differently."""
    place = names("pascal_context_459.glued").index
    return [(0, 255), (1, 255), (place("aeroplane") + 1, 0), (place("table") + 1, 49), (place("wood") + 1, 58)]


def draw(pairs: Pairs, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids in the file and prepared ids `[H, W]`: blocks; every pair occurs, but not in every picture."""
    shape = (HEIGHT // BLOCK, WIDTH // BLOCK)
    choice = np.random.default_rng(seed).integers(len(pairs), size=shape)
    choice.flat[seed % choice.size] = seed % len(pairs)
    choice.flat[-1] = next(k for k, pair in enumerate(pairs) if pair[1] not in (255, 65535, 11))
    table = np.array(pairs)[choice].repeat(BLOCK, 0).repeat(BLOCK, 1)
    return table[..., 0], table[..., 1]


def save_picture(file: Path, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(1000 + seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(file, quality=95)


def save_map(file: Path, ids: np.ndarray, palette: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8))
    if palette:  # colours that are not the ids
        image.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tolist())
        assert image.mode == "P"
    image.save(file)


def _fill(
    count: int, pairs: Pairs, splits: dict[str, str], write: Callable[[str, int, str, np.ndarray], str]
) -> Expected:
    """`write(folder of the split, number, split, ids in the file)` returns the file name."""
    expected: Expected = {}
    for offset, (split, folder) in enumerate(splits.items()):
        expected[split] = {}
        for number in range(1, count + 1):
            ids, prepared = draw(pairs, seed=number + 50 * offset)
            expected[split][write(folder, number, split, ids)] = prepared
    return expected


def coco(root: Path, count: int = 2, pairs: Pairs = COCO) -> Expected:
    def write(folder: str, number: int, split: str, ids: np.ndarray) -> str:
        stem = f"{number * 7 + len(folder):012d}"
        save_picture(root / folder / f"{stem}.jpg", seed=200 + number + 50 * len(folder))
        save_map(root / "stuffthingmaps" / folder / f"{stem}.png", ids)
        return f"{stem}.jpg"

    expected = _fill(count, pairs, {"train": "train2017", "validation": "val2017"}, write)
    for split, folder in (("train", "train2017"), ("validation", "val2017")):
        images = [{"id": k, "file_name": name} for k, name in enumerate(expected[split])]
        captions = [
            {"id": 2 * image["id"] + k, "image_id": image["id"], "caption": f"Caption {k} of {image['file_name']}. "}
            for image in images
            for k in (1, 0)
        ]
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": captions}
        (root / "annotations" / f"captions_{folder}.json").write_text(json.dumps(content))
    return expected


def ade20k_150(root: Path, count: int = 2) -> Expected:
    root = root / "ADEChallengeData2016"

    def write(folder: str, number: int, split: str, ids: np.ndarray) -> str:
        stem = f"ADE_{'train' if split == 'train' else 'val'}_{number:08d}"
        save_picture(root / "images" / folder / f"{stem}.jpg", seed=number + 100 * (split == "train"))
        save_map(root / "annotations" / folder / f"{stem}.png", ids)
        return f"{stem}.jpg"

    return _fill(count, ADE_150, {"train": "training", "validation": "validation"}, write)


def ade20k_847(root: Path, count: int = 2) -> Expected:
    """An index of 1000 objects in another order than the classes, some of them no class."""
    classes = names("ade20k_847")
    objects = [name for pair in zip(reversed(classes), (f"object {k}" for k in range(153))) for name in pair]
    objects += list(reversed(classes))[153:]
    pairs = [(0, 65535), (objects.index("object 7") + 1, 65535)]
    pairs += [(objects.index(classes[k]) + 1, k) for k in (0, 300, 844)]
    index: dict[str, list[str]] = {"filename": [], "folder": [], "objectnames": objects}
    root = root / "ADE20K_2021_17_01"

    def write(folder: str, number: int, split: str, ids: np.ndarray) -> str:
        stem = f"ADE_{'train' if split == 'train' else 'val'}_{number:08d}"
        place = f"images/ADE/{folder}/urban/street_{number % 2}"
        save_picture(root / place / f"{stem}.jpg", seed=number + 300 * (split == "train"))
        instance = np.full_like(ids, 77)
        colours = np.stack([ids // 256 * 10, ids % 256, instance], -1).astype(np.uint8)
        Image.fromarray(colours).save(root / place / f"{stem}_seg.png")
        (root / place / f"{stem}.json").write_text("{}")
        index["filename"].append(f"{stem}.jpg")
        index["folder"].append(f"ADE20K_2021_17_01/{place}")
        return f"{stem}.jpg"

    expected = _fill(count, pairs, {"train": "training", "validation": "validation"}, write)
    (root / "index_ade20k.pkl").write_bytes(pickle.dumps({**index, "objectcounts": np.zeros(3)}))
    return expected


def pascal_context(root: Path, count: int = 2, pairs: Pairs = CONTEXT_459, merged: bool = False) -> Expected:
    phases: dict[str, list[str]] = {"train": [], "val": []}

    def write(folder: str, number: int, split: str, ids: np.ndarray) -> str:
        stem = f"2008_{number + 100 * (split == 'train'):06d}"
        save_picture(root / "VOCdevkit/VOC2010/JPEGImages" / f"{stem}.jpg", seed=500 + number + 50 * (split == "train"))
        (root / "trainval").mkdir(exist_ok=True)
        savemat(root / "trainval" / f"{stem}.mat", {"LabelMap": ids.astype(np.uint16)}, do_compression=True)
        phases[folder].append(stem)
        return f"{stem}.jpg"

    expected = _fill(count, pairs, {"train": "train", "validation": "val"}, write)
    glued = names("pascal_context_459.glued")
    (root / "labels.txt").write_text("".join(f"{k}: {name}\n" for k, name in enumerate(glued, start=1)))
    if merged:
        images = [{"file_name": f"{stem}.jpg", "phase": phase} for phase, stems in phases.items() for stem in stems]
        (root / "trainval_merged.json").write_text(json.dumps({"images": images}))
    else:
        for phase, stems in phases.items():
            (root / f"pascalcontext_{phase}.txt").write_text("\n".join(stems) + "\n")
    return expected


def pascal_voc(root: Path, count: int = 2, pairs: Pairs = VOC_20) -> Expected:
    """The first training picture is VOC's own; SBD alone has the others, and it lists validation pictures too."""
    voc, sbd = root / "VOCdevkit/VOC2012", root / "benchmark_RELEASE/dataset"
    lists: dict[str, list[str]] = {"train": [], "val": [], "sbd": []}

    def write(folder: str, number: int, split: str, ids: np.ndarray) -> str:
        stem = f"2009_{number + 100 * (split == 'train'):06d}"
        own = split == "validation" or number == 1
        lists["val" if split == "validation" else "train" if own else "sbd"].append(stem)
        save_picture((voc / "JPEGImages" if own else sbd / "img") / f"{stem}.jpg", seed=700 + number + 50 * own)
        if own:
            save_map(voc / "SegmentationClass" / f"{stem}.png", ids, palette=True)
        else:
            (sbd / "cls").mkdir(parents=True, exist_ok=True)
            content = np.zeros((1, 1), dtype=[("Segmentation", object)])
            content[0, 0]["Segmentation"] = ids.astype(np.uint8)
            savemat(sbd / "cls" / f"{stem}.mat", {"GTcls": content})
        return f"{stem}.jpg"

    expected = _fill(count, pairs, {"train": "train", "validation": "val"}, write)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    for name in ("train", "val"):
        (voc / "ImageSets/Segmentation" / f"{name}.txt").write_text("\n".join(lists[name]) + "\n")
    sbd.mkdir(parents=True, exist_ok=True)
    (sbd / "train.txt").write_text("\n".join(lists["sbd"]) + "\n")
    (sbd / "val.txt").write_text("\n".join([*lists["train"], *lists["val"]]) + "\n")
    return expected


def camvid(root: Path, count: int = 2) -> Expected:
    def write(folder: str, number: int, split: str, ids: np.ndarray) -> str:
        name = f"0001TP_{number:06d}.jpg"
        save_picture(root / "images" / folder / name, seed=900 + number + 50 * (split == "train"))
        save_map(root / "annotations" / folder / name.replace("jpg", "png"), ids)
        return name

    return _fill(count, CAMVID, {"train": "train", "validation": "val"}, write)


TREES: dict[str, Callable[[Path], Expected]] = {
    "coco_stuff_171": coco,
    "coco_stuff_156": lambda root: coco(root, pairs=COCO_156),
    "coco_captions": coco,
    "ade20k_150": ade20k_150,
    "ade20k_847": ade20k_847,
    "pascal_context_59": lambda root: pascal_context(root, pairs=context_59()),
    "pascal_context_459": lambda root: pascal_context(root, merged=True),
    "pascal_voc_20": pascal_voc,
    "pascal_voc_20b": lambda root: pascal_voc(root, pairs=VOC_20B),
    "pascal_voc_15": lambda root: pascal_voc(root, pairs=VOC_15),
    "camvid_11": camvid,
}
