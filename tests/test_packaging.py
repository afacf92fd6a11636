"""What an installation promises: a light import, no forbidden dependency, package data, pins within the ranges."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
MEASURE = """
import json, sys, time
import transformers.models.auto
import transformers.pipelines
before = set(sys.modules)
start = time.perf_counter()
import ov_segmentation
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""


def import_once():
    """Seconds, and the modules it loads, of a fresh process's `import ov_segmentation`."""
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT / "src", capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def first_import():
    return import_once()


def test_import_costs_half_a_second(first_import):
    seconds = [first_import[0]]
    while min(seconds) > 0.5 and len(seconds) < 3:  # the best of three: other processes share the machine
        seconds.append(import_once()[0])
    assert min(seconds) <= 0.5, seconds


def test_import_loads_no_model_and_no_training(first_import):
    loaded = first_import[1]
    assert "ov_segmentation.auto" in loaded
    late = r"(^|\.)modeling_(?!outputs$|auto$)|^(accelerate|datasets|evaluate|scipy|tensorboard|pandas|pyarrow)$"
    assert [name for name in loaded if re.search(late, name)] == []


FORBIDDEN = {"torchvision", "timm", "detectron2", "mmcv", "mmseg", "open_clip", "clip"}
PYTHON_FILES = [
    path for folder in ("src", "conversion", "examples", "tools") for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_forbidden_import(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            imported |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    assert {name.split(".")[0] for name in imported} & FORBIDDEN == set()


PACKAGE = ROOT / "src" / "ov_segmentation"


def package_imports(path):
    """Modules of the package that a file of it imports, anywhere in it, as paths below the package."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = here[: len(here) + 1 - node.level]
            yield from [(*above, *node.module.split("."))] if node.module else [(*above, n.name) for n in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == PACKAGE.name:
            yield tuple(node.module.split(".")[1:]) or ("__init__",)


def part(module):
    """What CONTRIBUTING.md lists: a file of the package itself, a folder, a method."""
    return "/".join(module[: 2 if module[0] == "models" else 1])


def test_imports_make_no_circle_and_methods_import_no_other():
    needs = {}
    for path in PACKAGE.rglob("*.py"):
        own = part(path.relative_to(PACKAGE).with_suffix("").parts)
        needs.setdefault(own, set()).update({part(module) for module in package_imports(path)} - {own})
    assert {"layers", "modeling_base"} <= needs["models/san"]
    assert [name for name in TopologicalSorter(needs).static_order() if name not in needs] == []
    methods = {name for name in needs if name.startswith("models/")}
    assert {name: needs[name] & methods for name in methods if needs[name] & methods} == {}


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout: which files belong to the project cannot be told")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_machine_path_registry_or_secret_in_tracked_files():
    # Written in pieces, so that this file does not hold what it looks for.
    machine = [f"/{name}/" for name in ("work", "root", "home", "opt")]
    registry = ["pypi" + ".org", "python" + "hosted", "download.py" + "torch", "deb" + "ian.org", "npmjs" + ".org"]
    secret = ["hf" + r"_[A-Za-z0-9]{30,}", "-----BEGIN [A-Z ]*PRIVATE" + " KEY"]
    pattern = re.compile("|".join([rf"(?<![\w.}}/])(?:{'|'.join(machine)})\w", *map(re.escape, registry), *secret]))
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if "\0" not in text:  # not in pictures and weights: four bytes are there by chance
            found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy without a network (setuptools is in the dev extra)."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([*build, "--wheel-dir", str(source / "wheel")], cwd=source, check=True, timeout=300)
    (path,) = (source / "wheel").iterdir()
    return path


def test_wheel_holds_the_package_and_its_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    source = wheel.parents[1] / "src"
    patterns = ("*.py", "*.json", "*.md", "py.typed")
    expected = [path for pattern in patterns for path in (source / "ov_segmentation").rglob(pattern)]
    assert inside == {str(path.relative_to(source)) for path in expected}
    assert any(name.startswith("ov_segmentation/vocabularies/") for name in inside)
    assert "ov_segmentation/cards/checkpoint.md" in inside
    assert "ov_segmentation/py.typed" in inside  # without it a type checker does not read the annotations


def test_wheel_has_the_console_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        commands = archive.read(name).decode()
    assert "ov-segment = ov_segmentation.cli:main" in commands


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_says_what_it_is(metadata):
    assert metadata["License"] == "Apache-2.0"
    told = {"Topic :: Scientific/Engineering :: Image Recognition", "Typing :: Typed"}
    assert told <= set(metadata.get_all("Classifier", []))


def test_pins_are_within_the_ranges_and_complete(metadata):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonical(pin.name): pin for pin in map(Requirement, lines)}
    ranges = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {"torch", "transformers", "pytest"} <= {canonical(item.name) for item in ranges}
    build_tools = {"setuptools"}
    for item in ranges:
        if canonical(item.name) not in build_tools:
            (pin,) = pins[canonical(item.name)].specifier
            assert pin.operator == "=="
            assert item.specifier.contains(pin.version), f"{item} excludes the tested {pin.version}"
    assert str(pins["torch"].specifier) == "==2.13.0"


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()
