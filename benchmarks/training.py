"""Step time, memory and the share of data loading of training recipes: target for the latter below 10 %.

    python benchmarks/training.py --data build/bench --threads 2 --ledger results/training_speed.jsonl
    python benchmarks/training.py my_recipe.yaml --set batch_size=2

Without names: every recipe of examples/recipes, made to fit (`training_sizes.py`); `--data`: what `all.py` prepares.
Each is a fresh process that runs a few optimizer steps of the training loop itself, without evaluation. Pictures are
loaded as the recipe says: by this process, or by `num_workers` others, of which only the waiting counts as loading, and
whose memory is not in the peak; recipes of published sizes load here whatever they say, so that nothing hides behind
the model. Medians over the steps after the first, and after those whose pictures workers made before it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Rows, status
from benchmarks.training_sizes import RECIPES, fitted, kind_of, recipe_names

TARGET = 0.1
MADE_AHEAD = 2  # batches a worker, torch's prefetch_factor
Clock = tuple[float, float]


def clock() -> Clock:
    """Wall and processor seconds."""
    return time.perf_counter(), time.process_time()


class StepTimer:
    """Notes when each optimizer step ended, and how long the loading of its pictures took."""

    def __init__(self) -> None:
        self.ends: list[Clock] = []
        self.loading: list[Clock] = [(0.0, 0.0)]

    def loads(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts as loading."""

        def load(*arguments: Any, **keywords: Any) -> Any:
            start = clock()
            try:
                return function(*arguments, **keywords)
            finally:
                self.loading[-1] = tuple(old + now - then for old, now, then in zip(self.loading[-1], clock(), start))

        return load

    @contextmanager
    def running(self) -> Iterator[None]:
        """While entered, optimizer steps are noted."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def note(*given: Any) -> None:
            self.ends.append(clock())
            self.loading.append((0.0, 0.0))

        hook = register_optimizer_step_post_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def figures(self, skipped: int) -> dict[str, float]:
        """Medians over the steps after the first `skipped`."""
        steps = [tuple(b - a for a, b in zip(*pair)) for pair in zip(self.ends[skipped - 1 :], self.ends[skipped:])]
        loading = self.loading[skipped : skipped + len(steps)]
        seconds, cpu_seconds = (statistics.median(step[i] for step in steps) for i in (0, 1))
        data, data_cpu = (statistics.median(part[i] for part in loading) for i in (0, 1))
        return {
            "step_seconds": seconds,
            "step_cpu_seconds": cpu_seconds,
            "data_share": data / seconds,
            "data_cpu_share": data_cpu / cpu_seconds,
        }


def measure_recipe(recipe: str, folder: str, changes: Sequence[str], steps: int, threads: int) -> dict[str, Any]:
    """The figures of a recipe; in a process of its own."""
    import torch

    from ov_segmentation.strict_mapping import override

    torch.set_num_threads(threads)
    values, made = fitted(Path(recipe), Path(folder))
    for change in changes:
        override(values, change)
    kind, timer, before = kind_of(values), StepTimer(), status("VmRSS")
    skipped = 1 + MADE_AHEAD * values.get("num_workers", 0)
    values |= {"steps": skipped + steps}
    with tempfile.TemporaryDirectory() as output, timer.running():
        RUNNERS[kind](values, Path(output) / "run", timer)
    return {
        **timer.figures(skipped),
        "before_mib": round(before),
        "peak_mib": round(status("VmHWM")),
        "batch_size": values["batch_size"],
        "changes": [*made, *changes],
    }


def run_loop(values: Mapping[str, Any], output: Path, timer: StepTimer) -> None:
    """A run of segmentation or of mask adaptation, without evaluation, checkpoints and export."""
    import torch

    from ov_segmentation.strict_mapping import from_mapping
    from ov_segmentation.training.adaptation_recipe import AdaptationRecipe
    from ov_segmentation.training.loop import SegmentationRun
    from ov_segmentation.training.mask_adaptation import AdaptationRun
    from ov_segmentation.training.recipe import Recipe

    adapts = kind_of(values) == "adaptation"
    recipe_class, run_class = (AdaptationRecipe, AdaptationRun) if adapts else (Recipe, SegmentationRun)
    # what the recipe says would undo what this process was told
    values = {**values, "threads": torch.get_num_threads()}
    run = run_class(from_mapping(recipe_class, values), output, "never")
    run.evaluates = False
    run.store.save = lambda *given: None
    batches = run._batches

    def timed_batches() -> Iterator[Any]:
        of_loader = batches()
        load = timer.loads(lambda: next(of_loader))
        for _ in range(run.recipe.steps * run.recipe.accumulation):
            yield load()

    run._batches = timed_batches
    run.train([])


def run_clip(values: Mapping[str, Any], output: Path, timer: StepTimer) -> None:
    """Contrastive training of a small CLIP; loading: crops, captions, and scenes made anew."""
    from ov_segmentation.strict_mapping import from_mapping
    from ov_segmentation.training import contrastive

    recipe = from_mapping(contrastive.ContrastiveRecipe, {**values, "eval_scenes": 8})
    crops = contrastive.SceneCrops
    with (
        mock.patch.object(crops, "sample", timer.loads(crops.sample)),
        mock.patch.object(crops, "refresh", timer.loads(crops.refresh)),
    ):
        contrastive.train_clip(recipe, output, progress_bar=False)


def run_sam(values: Mapping[str, Any], output: Path, timer: StepTimer) -> None:
    """Training of a small SAM; loading: the making of scenes."""
    from ov_segmentation.data.scenes import SceneGenerator
    from ov_segmentation.strict_mapping import from_mapping
    from ov_segmentation.training import sam_training

    recipe = from_mapping(sam_training.SamRecipe, {**values, "eval_scenes": 16})
    with mock.patch.object(SceneGenerator, "render", timer.loads(SceneGenerator.render)):
        sam_training.train_sam(recipe, output, progress_bar=False)


RUNNERS = {"segmentation": run_loop, "adaptation": run_loop, "clip": run_clip, "sam": run_sam}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the recipes; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="YAML files (default: those of examples/recipes)")
    parser.add_argument("--data", type=Path, default=Path("build/bench"), help="folder with scenes and pairs")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for all of them")
    parser.add_argument("--steps", type=int, default=2, help="timed optimizer steps")
    Rows.add_options(parser)
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measure_recipe(**json.loads(options.here))))
        return 0
    if missing := [recipe for recipe in options.recipes if not Path(recipe).is_file()]:
        sys.exit(f"training.py: there is no recipe {', '.join(missing)}.")
    rows = Rows(__file__, arguments, options)
    for recipe in options.recipes or [RECIPES / f"{name}.yaml" for name in recipe_names()]:
        start, name = time.perf_counter(), Path(recipe).stem
        figures = None if options.set else rows.known({"name": name})
        if figures is None:
            task = {"recipe": str(recipe), "folder": str(options.data), "changes": options.set}
            figures = rows.measure(name, {**task, "steps": options.steps, "threads": options.threads})
            if figures is None:
                continue
            rows.record(start, figures, name=name, changes=figures.pop("changes"))
        met = "meets" if figures["data_share"] < TARGET else "misses"
        print(
            f"{name:<28}{figures['step_seconds']:8.2f} s a step of {figures['batch_size']} "
            f"(cpu {figures['step_cpu_seconds']:.2f}), data {100 * figures['data_share']:.1f} % "
            f"(cpu {100 * figures['data_cpu_share']:.1f} %), {met} {100 * TARGET:.0f} %, "
            f"peak {figures['peak_mib']} MiB",
            flush=True,
        )
    return int(rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
