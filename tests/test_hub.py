"""Push and pull over HTTP: the real client, in processes of its own, against a small Hub on the loopback interface."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import CommitOperationDelete, ModelCard, constants
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from ov_segmentation import ledger
from ov_segmentation.download_errors import loading_explained
from ov_segmentation.hub import commit_files
from tests import official_trees
from tests.hub_server import TOKEN, HubServer
from tests.parity.hparams import build
from tests.tiny import TOKENIZER

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "assets" / "san_scenes"
ORIGINAL = ROOT / "tests" / "fixtures" / "san" / "case_a"
WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
NAMES = ["red striped circle", "gray grainy ground"]
MODEL_FILES = {"README.md", "config.json", WEIGHTS}
PROCESSOR_FILES = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


def run(
    hub: HubServer, home: Path, *command: str | Path, token: str | None = TOKEN, offline: bool = False
) -> subprocess.CompletedProcess:
    """A Python process that knows this Hub; `home` holds its caches."""
    environment = hub.environment(home, token, offline)
    start = [sys.executable, *map(str, command)]
    return subprocess.run(start, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def reported(done: subprocess.CompletedProcess) -> dict:
    """What a script printed as JSON in its last line."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PUSH = """
import json, sys
import torch
from transformers import AutoProcessor
from ov_segmentation import AutoModelForOpenVocabularySegmentation, OpenVocabularySegmentationPipeline
from ov_segmentation.conversion_cli import main as convert
from examples.push_to_hub import main
from ov_segmentation.hub import HubError
model = AutoModelForOpenVocabularySegmentation.from_pretrained(sys.argv[1], dtype=torch.float32)
processor = AutoProcessor.from_pretrained(sys.argv[1])
processor.push_to_hub("somebody/parts")
model.push_to_hub("somebody/parts", commit_message="the model", tags=["tiny"])
OpenVocabularySegmentationPipeline(model, processor).push_to_hub("somebody/pipeline", revision="dev")
results = ["--results", sys.argv[2], "--name", "mine", "--license", "cc-by-nc-4.0"]
main([sys.argv[1], "somebody/whole", "--message", "all at once", *results])
main([sys.argv[1], "somebody/secret", "--private"])
convert("san", [*sys.argv[3:], "--push-to-hub", "somebody/converted"])
AutoModelForOpenVocabularySegmentation.from_pretrained(sys.argv[-1]).push_to_hub("somebody/again")
errors = {}
for attempt in ("cut", "again"):
    try:
        main([sys.argv[1], "somebody/cut", "--message", attempt])
    except SystemExit as error:
        errors[attempt] = str(error)
for case, repo_id in {"owner": "somebody-else/model", "name": "no such/name"}.items():
    try:
        model.push_to_hub(repo_id)
    except HubError as error:
        errors[case] = str(error)
lacking = {"folder": ["nowhere", "somebody/x"], "ledger": [sys.argv[1], "somebody/x", *results[:2]]}
for case, arguments in lacking.items():
    try:
        main(arguments)
    except SystemExit as error:
        errors[case] = str(error)
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """The messages of the pushes that failed; what the others pushed is on the Hub."""
    home = tmp_path_factory.mktemp("push")
    build("san", json.loads((ORIGINAL / "hparams.json").read_text()))[0].save_pretrained(home)
    TOKENIZER.save_pretrained(home / "tokenizer")
    conversion = ["--checkpoint", ORIGINAL / "original.pth", "--config", home / "config.json"]
    conversion += ["--tokenizer", home / "tokenizer", "--output", home / "converted"]
    for name in ("mine", "another"):
        ledger.append(
            home / "ledger.jsonl",
            command=f"measure {name} --data={home}/streets",
            seed=0,
            seconds=1,
            figures={"miou": 0.25 if name == "mine" else 0.5},
            protocol="streets",
            method="san",
            name=name,
            model=f"{home}/checkpoint",
        )
    hub.cut_commits = {"somebody/cut": 1}
    return reported(run(hub, home, "-c", PUSH, CHECKPOINT, home / "ledger.jsonl", *conversion))


def test_model_and_processor_push_to_one_repository(hub, pushed):
    repository = hub.model("somebody/parts")
    assert set(repository.files()) == MODEL_FILES | PROCESSOR_FILES
    assert list(repository.titles.values()) == ["initial commit", "Upload SANProcessor", "the model"]
    card = ModelCard(repository.files()["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("ov_segmentation", "image-segmentation")
    assert "tiny" in card.data.tags
    assert 'model="somebody/parts"' in card.text and "import ov_segmentation" in card.text


def test_a_pipeline_pushes_model_and_processor_to_a_branch(hub, pushed):
    repository = hub.model("somebody/pipeline")
    assert set(repository.files("dev")) == MODEL_FILES | PROCESSOR_FILES
    assert not repository.files("main")


def test_the_command_pushes_everything_in_one_commit(hub, pushed):
    repository = hub.model("somebody/whole")
    files = repository.files()
    assert set(files) == MODEL_FILES | PROCESSOR_FILES | {"results.jsonl"}
    assert list(repository.titles.values()) == ["initial commit", "all at once"]
    assert files[WEIGHTS] == (CHECKPOINT / WEIGHTS).read_bytes()
    (line,) = [json.loads(line) for line in files["results.jsonl"].splitlines()]
    assert (line["command"], line["figures"]) == ("measure mine --data=streets", {"miou": 0.25})
    assert line["model"] == "checkpoint"
    card = ModelCard(files["README.md"].decode())
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {"mean IoU": 0.25}
    assert card.data.license == json.loads(files["config.json"])["weights_license"] == "cc-by-nc-4.0"


def test_a_converted_checkpoint_is_pushed_with_its_card(hub, pushed):
    files = hub.model("somebody/converted").files()
    assert set(files) == MODEL_FILES | PROCESSOR_FILES
    for repo_id in ("somebody/converted", "somebody/again"):  # again: loaded from the folder and pushed
        card = ModelCard(hub.model(repo_id).files()["README.md"].decode())
        assert "Converted from the authors' checkpoint" in card.text and "original.pth" in card.text


@pytest.mark.parametrize(("name", "removed"), [(WEIGHTS, ["model-1.safetensors", SHARDS]), ("README.md", [])])
def test_weights_of_an_earlier_push_go_with_the_new_ones(name, removed):
    class Hub:
        def list_repo_files(self, repo_id, revision):
            return ["config.json", "model-1.safetensors", SHARDS, "onnx/model.safetensors"]

        def create_commit(self, repo_id, operations, **options):
            return operations

    operations = commit_files(Hub(), "somebody/shards", {name: b"new"}, message="m")
    assert [one.path_in_repo for one in operations] == [name, *removed]
    assert all(isinstance(one, CommitOperationDelete) for one in operations[1:])


def test_what_cannot_be_pushed_says_what_to_do(hub, pushed):
    assert "403" in pushed["owner"] and "choose an OWNER" in pushed["owner"]
    assert "'no such/name' is no repository id" in pushed["name"]
    assert pushed["folder"] == "HubError: There is no folder nowhere."
    assert "There is no line of" in pushed["ledger"] and "another, mine" in pushed["ledger"]
    assert ("models", "somebody/x") not in hub.repositories


def test_a_push_that_is_cut_commits_nothing_and_goes_through_again(hub, pushed):
    assert f"{hub.url} cannot be reached or broke off" in pushed["cut"]
    assert "start the same command again" in pushed["cut"]
    assert "again" not in pushed
    assert list(hub.model("somebody/cut").titles.values()) == ["initial commit", "again"]


PULL = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
from ov_segmentation import AutoModelForOpenVocabularySegmentation as AutoSegmentation
from PIL import Image
picture, names = Image.open("assets/scene.png"), json.loads(sys.argv[2])
maps, errors = {}, {}
for source in ("somebody/parts", sys.argv[1]):
    segment = pipeline("open-vocabulary-segmentation", model=source, dtype=torch.float32)
    maps[source] = segment(picture, candidate_labels=names, output_type="map")["segmentation"].tolist()
model, processor = AutoModel.from_pretrained("somebody/whole"), AutoProcessor.from_pretrained("somebody/whole")
branch = AutoSegmentation.from_pretrained("somebody/pipeline", revision="dev")
attempts = {
    "private": lambda: AutoSegmentation.from_pretrained("somebody/secret"),
    "private processor": lambda: AutoProcessor.from_pretrained("somebody/secret"),
    "private pipeline": lambda: pipeline("open-vocabulary-segmentation", model="somebody/secret"),
    "revision": lambda: AutoSegmentation.from_pretrained("somebody/parts", revision="v9"),
    "empty branch": lambda: AutoSegmentation.from_pretrained("somebody/pipeline"),
    "cut for good": lambda: AutoSegmentation.from_pretrained("somebody/broken"),
}
for case, attempt in attempts.items():
    try:
        attempt()
    except Exception as error:
        errors[case] = f"{type(error).__name__}: {error}"
AutoSegmentation.from_pretrained("somebody/secret", token="hf_dummy")
healed = AutoSegmentation.from_pretrained("somebody/broken").state_dict()
found = {"healed": all(torch.equal(healed[name], value) for name, value in model.state_dict().items())}
found |= {"model": type(model).__name__, "processor": type(processor).__name__, "branch": type(branch).__name__}
print(json.dumps({**found, "maps": list(maps.values()), "errors": errors}))
"""


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("pull")


@pytest.fixture(scope="module")
def pulled(hub, pushed, caches):
    """What a fresh process without a token finds; `caches` holds what it downloaded."""
    hub.repositories["models", "somebody/broken"] = hub.model("somebody/whole")
    hub.cuts = {f"somebody/parts/{WEIGHTS}": [1_000_000, 2_000_000], f"somebody/broken/{WEIGHTS}": [1_000_000] * 6}
    return run(hub, caches, "-c", PULL, CHECKPOINT, json.dumps(NAMES), token=None)


def test_a_fresh_process_pulls_and_segments(pulled):
    found = reported(pulled)
    assert found["model"] == found["branch"] == "SANForOpenVocabularySegmentation"
    assert found["processor"] == "SANProcessor"
    remote, local = found["maps"]
    assert remote == local and len({label for row in remote for label in row}) > 1


def test_a_licence_is_shown_at_load(pulled):
    assert pulled.stderr.count("Licence of these weights: cc-by-nc-4.0") == 1


def test_a_connection_that_is_cut_is_tried_again(hub, pulled):
    reported(pulled)
    assert len(hub.downloads("somebody/parts", WEIGHTS)) == 3
    assert pulled.stderr.count("Trying to resume download") >= 2


def test_a_connection_that_stays_cut_leaves_nothing_corrupt(hub, pulled, caches):
    """The error names file and cause; the next attempt gives the weights to the bit."""
    found = reported(pulled)
    error = found["errors"]["cut for good"]
    assert f"The connection to {hub.url} broke off while somebody/broken was downloaded" in error
    assert "received 1000000 bytes, expected" in error
    assert found["healed"]
    assert hub.cuts[f"somebody/broken/{WEIGHTS}"] == []
    copies = [path for path in caches.rglob("*") if path.is_file() and path.stat().st_size >= 900_000]
    whole = {(CHECKPOINT / WEIGHTS).read_bytes(), hub.model("somebody/parts").files()[WEIGHTS]}
    assert copies and {path.read_bytes() for path in copies} == whole
    assert not list(caches.rglob("*.incomplete"))


DOWNLOAD = """
import sys
from huggingface_hub import hf_hub_download
print(hf_hub_download("somebody/large", "model.safetensors"))
"""


def test_what_kept_a_checkpoint_from_being_loaded_is_said(monkeypatch):
    """Without a server: the errors behind transformers' one, which names neither path nor id."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    no_answer = LocalEntryNotFoundError("an error happened while trying to locate the file")
    no_answer.__cause__ = HTTPError("connection refused")
    for cause, message in (
        (HFValidationError("bad"), "There is no folder runs/a/b, nor is that an id on the Hub"),
        (no_answer, r"runs/a/b is no folder here.* did not give it \(HTTPError: connection refused\)"),
        (LocalEntryNotFoundError("no"), r"did not give it\. Check"),
        (HTTPError("cut"), "broke off while runs/a/b was downloaded"),
        (None, "as it was"),
    ):
        with pytest.raises(OSError, match=message), loading_explained("outer"), loading_explained("runs/a/b"):
            raise OSError("as it was") from cause


def test_a_large_download_goes_on_where_it_was_cut(hub, pushed, tmp_path):
    """The client keeps what it has in pieces of 10 MiB."""
    content = np.random.default_rng(0).bytes(24_000_000)
    hub.repositories["models", "somebody/large"] = type(hub.model("somebody/parts"))()
    hub.model("somebody/large").commit({WEIGHTS: content}, "by hand")
    hub.cuts[f"somebody/large/{WEIGHTS}"] = [21_500_000]
    done = run(hub, tmp_path, "-c", DOWNLOAD)
    assert done.returncode == 0, done.stderr
    assert hub.downloads("somebody/large", WEIGHTS) == [None, f"bytes={2 * 10 * 2**20}-"]
    assert Path(done.stdout.strip()).read_bytes() == content


def test_a_private_repository_without_a_token_says_so(pulled):
    errors = reported(pulled)["errors"]
    for case in ("private", "private processor", "private pipeline"):
        assert "somebody/secret" in errors[case] and "token" in errors[case]


def test_an_unknown_revision_says_so(pulled):
    errors = reported(pulled)["errors"]
    assert "v9" in errors["revision"] and "somebody/parts" in errors["revision"]
    assert "somebody/pipeline" in errors["empty branch"] and "config.json" in errors["empty branch"]


OFFLINE = """
import json, sys
from transformers import pipeline
from ov_segmentation import AutoModelForOpenVocabularySegmentation, SANForOpenVocabularySegmentation, SANProcessor
from ov_segmentation.hub import HubError, push_checkpoint
from PIL import Image
picture, names = Image.open("assets/scene.png"), json.loads(sys.argv[2])
segment = pipeline("open-vocabulary-segmentation", model="somebody/parts")
found = {"labels": segment(picture, candidate_labels=names, output_type="map")["labels"]}
for case, load in {
    "pipeline": lambda source: pipeline("open-vocabulary-segmentation", model=source),
    "auto": AutoModelForOpenVocabularySegmentation.from_pretrained,
    "model": SANForOpenVocabularySegmentation.from_pretrained,
    "processor": SANProcessor.from_pretrained,
}.items():
    try:
        load("somebody/never-seen")
    except OSError as error:
        found[case] = str(error)
try:
    push_checkpoint(sys.argv[1], "somebody/parts")
except HubError as error:
    found["push"] = str(error)
print(json.dumps(found))
"""


def test_offline_what_is_cached_loads_and_what_is_not_says_so(hub, pulled, caches):
    before = len(hub.requests)
    found = reported(run(hub, caches, "-c", OFFLINE, CHECKPOINT, json.dumps(NAMES), offline=True))
    assert found["labels"] == NAMES
    # transformers' `pipeline` reads the configuration by itself
    assert "couldn't find them in the cached files" in found["pipeline"] and "offline mode" in found["pipeline"]
    assert "Can't load image processor for 'somebody/never-seen'" in found["processor"]
    for case in ("auto", "model"):
        assert "somebody/never-seen is no folder here" in found[case] and "HF_HUB_OFFLINE is set" in found[case]
    assert "HF_HUB_OFFLINE" in found["push"]
    assert len(hub.requests) == before


DATA_PUSH = """
import json, sys
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List
from PIL import Image as Pictures
from examples.prepare_dataset import main
random, names = np.random.default_rng(0), ["sky", "road", "car"]
rows = [
    {
        "image": Pictures.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)),
        "annotation": Pictures.fromarray(random.choice([0, 1, 2, 999], (24, 32)).astype(np.uint16)),
        "classes": [0, 2],
    }
    for _ in range(4)
]
features = Features({"image": Image(), "annotation": Image(), "classes": List(ClassLabel(names=names))})
splits = DatasetDict({"train": Dataset.from_list(rows, features=features)})
splits.push_to_hub("somebody/streets")
splits.push_to_hub("somebody/hidden", private=True)
main([*sys.argv[1:], "--expect-counts", "off", "--push-to-hub", "somebody/camvid"])
try:
    main([*sys.argv[1:], "--expect-counts", "off", "--push-to-hub", "somebody-else/camvid"])
except SystemExit as error:
    print(json.dumps({"refused": str(error)}))
"""

DATA_PULL = """
import json, sys
from datasets import load_dataset
from ov_segmentation.data.datasets import load_segmentation_data
def attempt(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
found = {"private": attempt(lambda: load_segmentation_data("somebody/hidden"))}
found["revision"] = attempt(lambda: load_segmentation_data("somebody/streets", revision="v9"))
if sys.argv[1] == "online":
    whole, stream = (load_dataset("somebody/streets", split="train", streaming=way) for way in (False, True))
    pairs = [[(row["image"].tobytes(), row["annotation"].tobytes()) for row in rows] for rows in (whole, stream)]
    found["equal"] = pairs[0] == pairs[1]
    found["deepest"] = max(row["annotation"].getextrema()[1] for row in stream)
    for name, ignored in {"streets": 999, "camvid": 11}.items():
        data = load_segmentation_data(f"somebody/{name}", streaming=True, ignore_index=ignored)
        streams = {split: data.stream(split).samples(lambda index: True) for split in data.splits}
        found[name] = {split: sum(1 for _ in stream) for split, stream in streams.items()}
        found[f"{name} names"] = data.vocabulary.labels
else:
    found["cached"] = len(load_dataset("somebody/streets", split="train"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def data_pushed(hub, tmp_path_factory):
    """What the push of data sets printed last; the data sets are on the Hub."""
    home = tmp_path_factory.mktemp("data")
    official_trees.camvid(home / "in")
    arguments = ["camvid_11", "--source", home / "in", "--output", home / "out"]
    found = reported(run(hub, home, "-c", DATA_PUSH, *arguments))
    found["private"] = hub.dataset("somebody/camvid").private
    hub.dataset("somebody/camvid").private = False
    return found


@pytest.fixture(scope="module")
def data_pulled(hub, data_pushed, caches):
    for name in ("streets", "camvid"):  # the first is downloaded and streamed, the second streamed only
        files = [file for file in hub.dataset(f"somebody/{name}").files() if file.endswith(".parquet")]
        hub.cuts |= {f"somebody/{name}/{file}": [500] for file in files}
    return reported(run(hub, caches, "-c", DATA_PULL, "online", token=None))


def test_data_sets_load_and_stream(data_pulled):
    assert data_pulled["equal"] and data_pulled["deepest"] == 999
    assert (data_pulled["streets names"], data_pulled["streets"]) == (["sky", "road", "car"], {"train": 4})


def test_data_sets_that_are_cut_go_on(hub, data_pulled):
    """To the right pictures (above and below): none is lost, none comes twice."""
    cut = [left for file, left in hub.cuts.items() if file.endswith(".parquet")]
    assert len(cut) == 3 and not any(cut)


def test_data_sets_that_cannot_be_had_or_pushed_say_so(data_pushed, data_pulled):
    assert "somebody/hidden" in data_pulled["private"] and "HF_TOKEN" in data_pulled["private"]
    assert "v9" in data_pulled["revision"] and "somebody/streets" in data_pulled["revision"]
    assert "403" in data_pushed["refused"] and "the same command goes on" in data_pushed["refused"]


def test_data_sets_offline(hub, data_pulled, caches):
    before = len(hub.requests)
    found = reported(run(hub, caches, "-c", DATA_PULL, "offline", offline=True))
    assert found["cached"] == 4
    assert "somebody/hidden" in found["private"] and "offline" in found["private"].lower()
    assert len(hub.requests) == before


def test_a_prepared_data_set_is_pushed_and_streams(hub, data_pushed, data_pulled):
    assert data_pushed["private"]
    assert "README.md" in hub.dataset("somebody/camvid").files()
    assert data_pulled["camvid"] == {"train": 2, "validation": 2}
    assert len(data_pulled["camvid names"]) == 11
