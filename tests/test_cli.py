"""The command ov-segment, and its doctor on whole, damaged, foreign and original checkpoints."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from ov_segmentation import AutoModelForOpenVocabularySegmentation
from ov_segmentation.auto import METHODS, load_class
from ov_segmentation.checkpoint_report import released_variants
from ov_segmentation.cli import main
from ov_segmentation.models.san.image_processing_san import SANImageProcessor
from ov_segmentation.models.san.processing_san import SANProcessor
from tests.models.test_san import TestSAN as Tiny
from tests.tiny import TOKENIZER, tiny_clip_config, tiny_pictures

FIXTURES = Path(__file__).parent / "fixtures"


def save_processor(folder):
    image_processor = SANImageProcessor(size={"shortest_edge": 32, "longest_edge": 96})
    SANProcessor(image_processor, TOKENIZER, ["a {}."]).save_pretrained(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Tiny().model(weights_license="mit").save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copied"))


# ---------------------------------------------------------------------- ov-segment PICTURE


@pytest.fixture
def picture(tmp_path):
    tiny_pictures((40, 60))[0].save(tmp_path / "street.png")
    return tmp_path / "street.png"


def run(*arguments):
    main(list(map(str, arguments)))


def test_a_picture(whole, picture, tmp_path, capsys):
    outputs = {
        name: tmp_path / f"out.{suffix}" for name, suffix in (("output", "jpg"), ("label-map", "png"), ("json", "json"))
    }
    options = [part for name, path in outputs.items() for part in (f"--{name}", path)]
    run(picture, "--labels", "road, tree, sky", "--model", whole, *options)
    printed = capsys.readouterr().out
    rows = json.loads(outputs["json"].read_text())
    assert rows and sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    for row in rows:
        assert f"{row['label']:5}  {row['share']:6.1%}" in printed
    label_map = np.array(Image.open(outputs["label-map"]))
    assert label_map.shape == (40, 60) and label_map.max() <= 2
    assert {["road", "tree", "sky"][k] for k in np.unique(label_map)} == {row["label"] for row in rows}
    assert Image.open(outputs["output"]).height == 40


def test_a_packaged_vocabulary_in_the_checkpoints_own_texts(picture, tmp_path, monkeypatch, capsys):
    """The bundled SED takes one template, the published 80."""
    monkeypatch.chdir(tmp_path)
    run(picture, "--vocabulary", "camvid_11", "--model", Path(__file__).parents[1] / "assets/sed_scenes")
    assert "confidence" in capsys.readouterr().out


def test_an_overlay_is_the_default(whole, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(picture, "--labels", "road,tree", "--model", whole, "--threshold", "1")
    assert "(unlabelled)  100.0%" in capsys.readouterr().out
    assert Image.open(tmp_path / "segmented.png").size == (60, 40)
    run(picture, "--labels", "road,tree", "--model", whole, "--background", "no_object", "--output", "other.png")
    assert (tmp_path / "other.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("none.png", "--labels", "road"), "no such file"),
        (("{picture}", "--labels", "road,road"), "road"),
        (("{picture}", "--labels", " "), "name"),
        (("{picture}", "--labels", "road", "--threshold", "7"), "between 0 and 1"),
        (("{picture}", "--labels", "road", "--set", "no_such_switch=1"), "no_such_switch"),
        (("{picture}", "--labels", "road", "--background", "sea"), "sea"),
        (("{picture}", "--labels", "road", "--output", "nowhere/x.png"), "no folder nowhere"),
        (("{picture}", "--labels", "road", "--output", "{folder}/x.nonsense"), "nonsense"),
        (("{picture}", "--vocabulary", "ade"), "neither a file nor a packaged one"),
        (("{picture}", "--labels", "road", "--model", "./nothing"), "There is no folder ./nothing, nor is that"),
        (("{picture}", "--labels", "road", "--model", "runs/san"), "runs/san is no folder here, nor (or not all"),
        (("{picture}", "--vocabulary", "camvid_11", "--model", "runs/san"), "runs/san is no folder here"),
        (("{picture}", "--labels", "road", "--model", "{picture}"), "is a file, and a checkpoint is a folder"),
        (("{picture}", "--labels", "road", "--device", "cpuu"), "--device cpuu cannot be used here"),
    ],
)
def test_bad_input_is_a_message(whole, picture, tmp_path, options, message):
    options = [option.format(picture=picture, folder=tmp_path) for option in options]
    with pytest.raises(SystemExit) as ending:
        run("--model", whole, *options)
    assert isinstance(ending.value.code, str)
    assert ending.value.code.startswith("ov-segment: ") and message in ending.value.code


@pytest.mark.parametrize("module", ["ov_segmentation", "ov_segmentation.cli"])
def test_the_command_as_a_module(module):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: ov-segment" in done.stderr


def test_a_wrong_command_line_ends_with_2(whole, picture, capsys):
    for options in ((picture,), (picture, "--model", whole), ("doctor",)):
        with pytest.raises(SystemExit) as ending:
            run(*options)
        assert ending.value.code == 2
    assert "--labels" in capsys.readouterr().err


# ---------------------------------------------------------------------- ov-segment doctor


@pytest.mark.parametrize(
    ("model_type", "variants"), [("san", ["san_vit_large_14"]), ("sed", ["convnextB_768"]), ("deop", None)]
)
def test_releases_are_recognised(model_type, variants):
    method = next(method for method in METHODS if method.model_type == model_type)
    rules = importlib.import_module(f"ov_segmentation.models.{model_type}.convert_{model_type}")
    variants = variants or list(rules.VARIANTS)  # DeOP's differ in what they were trained on, and how far
    with torch.device("meta"):
        model = load_class(method.model)(rules.VARIANTS[variants[0]]())
    assert released_variants(method, model) == variants


def doctor(capsys, checkpoint):
    """Exit code and report."""
    with pytest.raises(SystemExit) as ending:
        run("doctor", checkpoint)
    return ending.value.code, capsys.readouterr().out


def test_a_whole_checkpoint(whole, tmp_path, capsys):
    for checkpoint in (whole, whole / "model.safetensors"):
        code, report = doctor(capsys, checkpoint)
        assert code == 0
        for fact in ("SAN (SANForOpenVocabularySegmentation)", "no released size", "float32", "mit", "SANProcessor"):
            assert fact in report
        assert "4 x 4 and a class token (clip.vision_model.embeddings.position_embedding.weight)" in report
        assert "shortest_edge 32" in report
    assert "No problems found." not in report and str(whole) in report, "it says that the folder is meant"
    run_folder = Path(shutil.copytree(whole, tmp_path / "run" / "model")).parent
    with pytest.raises(SystemExit, match="is the folder of a training run: its checkpoint is "):
        run(tmp_path / "none.png", "--vocabulary", "camvid_11", "--model", run_folder)
    code, report = doctor(capsys, run_folder)
    assert code == 1 and f"the folder of a training run: its checkpoint is {run_folder / 'model'}" in report


def test_half_precision_is_told(copied, capsys):
    model = Tiny().model().bfloat16()
    model.save_pretrained(copied)
    assert "bfloat16" in doctor(capsys, copied)[1]


def test_damaged_weights(copied, capsys):
    file = copied / "model.safetensors"
    weights = load_file(file)
    lost, nan, short = sorted(name for name in weights if name.endswith("mlp.fc1.weight") and "vision" in name)[:3]
    del weights[lost]
    weights[nan][0, 0] = torch.nan
    weights[short] = weights[short][1:].contiguous()
    weights["classifier.weight"] = torch.zeros(2)
    save_file(weights, file, {"format": "pt"})
    code, report = doctor(capsys, copied)
    assert code == 1
    assert "4 problems" in report
    assert f"1 weights are missing: {lost}" in report
    assert "1 keys have no place in the model: classifier.weight" in report
    assert f"{short} ([63, 32] instead of [64, 32])" in report
    assert f"1 weights hold NaN or infinite values: {nan}" in report
    file.write_bytes(file.read_bytes()[:1000])
    code, report = doctor(capsys, copied)
    assert code == 1 and "The weights cannot be loaded" in report


def test_other_processors(copied, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (copied / name).unlink()
    code, report = doctor(capsys, copied)
    assert code == 1 and "The processor cannot be loaded" in report
    SANImageProcessor().save_pretrained(copied)
    code, report = doctor(capsys, copied)
    assert code == 1 and "Save SANProcessor(" in report, "with a tokenizer"
    save_processor(copied)
    config = json.loads((copied / "config.json").read_text())
    config["clip_config"]["text_config"]["eos_token_id"] = 5
    (copied / "config.json").write_text(json.dumps(config))
    code, report = doctor(capsys, copied)
    assert code == 1 and f"token {TOKENIZER.eos_token_id} to the tokenizer, 5 to the model" in report


def test_what_is_no_checkpoint(tmp_path, capsys):
    code, report = doctor(capsys, tmp_path)
    assert code == 1 and "no config.json" in report
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pth")
    code, report = doctor(capsys, tmp_path)
    assert f"try `ov-segment doctor {tmp_path / 'model.pth'}`" in report
    code, report = doctor(capsys, tmp_path / "model.pth")
    assert code == 1 and "of no method that is known here: a" in report
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    code, report = doctor(capsys, tmp_path)
    assert code == 1 and "'bert', which is none of" in report
    code, report = doctor(capsys, tmp_path / "nothing")
    assert code == 1 and f"cannot be read: There is no folder {tmp_path / 'nothing'}" in report


def test_a_plain_clip(tmp_path, capsys):
    CLIPModel(CLIPConfig(**tiny_clip_config())).save_pretrained(tmp_path)
    code, report = doctor(capsys, tmp_path)
    assert code == 0 and "a plain CLIP" in report and "float32" in report
    assert "and a class token (vision_model.embeddings.position_embedding.weight)" in report
    weights = load_file(tmp_path / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    code, report = doctor(capsys, tmp_path)
    assert code == 1 and "1 weights are missing: logit_scale" in report
    with pytest.raises(ValueError, match=r"leaves 1 weights of a CLIP unset \(logit_scale\)"):
        AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path)


def original(manifest, file):
    """A file with the keys and shapes of a release, in which every tensor is one number."""
    entries = json.loads((FIXTURES / manifest).read_text())
    tensors = {key: torch.zeros((), dtype=getattr(torch, kind)).expand(shape) for key, (shape, kind) in entries.items()}
    torch.save({"model": tensors}, file)
    return file


def test_files_of_the_originals(tmp_path, capsys):
    file = original("san/keys_full_san_vit_b_16.json", tmp_path / "san.pth")
    code, report = doctor(capsys, file)
    assert code == 0
    assert "SAN, as its authors saved it" in report and "san_vit_b_16" in report
    command = f"python conversion/convert_san.py --checkpoint {file} --variant san_vit_b_16 --output DIR"
    assert command in report
    code, report = doctor(capsys, FIXTURES / "san/case_a/original.pth")
    assert code == 1
    assert "keys are those of SAN, but no released size" in report and "--config config.json" in report
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    code, report = doctor(capsys, tmp_path / "broken.pth")
    assert code == 1 and "broken.pth is damaged" in report
