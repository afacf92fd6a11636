"""A training run, whatever is trained: steps, log, evaluation, checkpoints, continuation, export.

A run is a function of recipe and seed. Its place is the number of optimizer steps done: order, augmentation, points in
the loss and dropout are seeded from it, so a run that is killed and started again with the same command ends with the
same weights and the same log (bit by bit on a CPU with the same number of threads).
"""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .. import ledger
from ..losses import accumulated_batches
from ..strict_mapping import RecipeError
from .building import trainable_parameters
from .checkpointing import CheckpointStore, TrainingState
from .data_loading import StepBatches, training_loader
from .exporting import export_model
from .optimization import build_optimizer, learning_rate_factor, set_learning_rates
from .randomness import seed_step
from .run_folder import CHECKPOINTS, RunFolder
from .sharding import make_shardable, whole_weights
from .termination import Terminated, stop_signals
from .trackers import JSONLinesTracker, build_trackers

DIVERGED = (
    "Lower the learning rate, clip the gradient (clip_grad_norm), or train in full precision (precision: no). The last "
    "checkpoint is intact."
)


class TrainingRun:
    """One process's part of a run; what is trained on what and how it is scored is a subclass's.

    `prepare` sets, and the rest of the run uses:
        model: what is exported.
        processor: exported beside it.
        trained: the module whose forward pass gives `loss` and `loss_dict`, and whose weights are kept in checkpoints.
        samples: the endless training sequence; `make_batch` makes a batch of a list of samples.
        evaluates: whether there is something to evaluate on.
    """

    model: Any
    processor: Any
    trained: nn.Module
    samples: Dataset
    make_batch: Callable[..., dict[str, torch.Tensor]]
    evaluates: bool
    score_name: ClassVar[str]
    """Figure of an evaluation that tells which one is the best; higher is better."""

    def __init__(self, recipe: Any, output: Path, resume: str) -> None:
        self.recipe = recipe
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.code = ledger.revision()  # now: the checkout may move on while this process runs what it has loaded
        if recipe.precision == "fp16" and not torch.accelerator.is_available():
            raise RecipeError("precision: fp16 needs a GPU. On a CPU: bf16, or no.")
        AcceleratorState._reset_state()  # an earlier run of this process, in a notebook, may have had another precision
        self.accelerator = Accelerator(
            mixed_precision=recipe.precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=recipe.accumulation, sync_with_dataloader=False
            ),
            # what a frozen CLIP computes last takes no part in the loss
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            accelerator.state.deepspeed_plugin.deepspeed_config |= deepspeed_values(recipe, accelerator.num_processes)
        self.folder = RunFolder(output)
        self.store = CheckpointStore(output / CHECKPOINTS, recipe.checkpoint.total_limit)
        self._on_main(lambda: self.folder.claim(recipe, resume))
        self._on_main(self.store.remove_temporary)

        self.prepare()
        self.trained.train()
        self.trained.to(accelerator.device)
        self.constants = self.constant_inputs()  # before the weights are shared out
        if accelerator.distributed_type == DistributedType.FSDP:
            make_shardable(self.trained)
        optimizer = build_optimizer(self.trained, recipe.optimizer)
        self.wrapped, self.optimizer = accelerator.prepare(self.trained, optimizer)
        self.state = TrainingState()
        done = self.store.steps()
        self.continues = bool(done)
        if done:
            self.state = self.store.load(accelerator, self.wrapped, self.optimizer, done[-1])
        self._began_at = self.state.step
        self._start_trackers()
        self._say(
            f"{type(self.model).__name__}: {trainable_parameters(self.trained):,} of "
            f"{self.model.num_parameters():,} parameters are trained, on {self.describe_data()}; "
            f"{accelerator.num_processes} process(es), device {accelerator.device}."
        )
        if done:
            self._say(f"Continuing after optimizer step {self.state.step} of {recipe.steps}.")

    # ------------------------------------------------------------------ what a subclass fills in

    def prepare(self) -> None:
        """Build model, processor and data, see the class."""
        raise NotImplementedError

    def constant_inputs(self) -> dict[str, torch.Tensor]:
        """Arguments of every forward pass beside the batch."""
        return {}

    def describe_data(self) -> str:
        """What is trained on, for the first line that is printed."""
        raise NotImplementedError

    def class_names_shown(self) -> list[str]:
        """The names that training showed, for the card."""
        return []

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def evaluate(self) -> dict[str, Any]:
        """Figures of an evaluation, among them `score_name`. Every process calls it."""
        raise NotImplementedError

    def exported_weights(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The exported model's weights, from those of `trained`."""
        return weights

    # ------------------------------------------------------------------ the run

    def execute(self, command: str) -> dict[str, Any]:
        """Train what is left to train, export; `command`: shell command, recorded in the exported weights."""
        with stop_signals() as arrived:
            self.train(arrived)
        return self.finish(command)

    def train(self, arrived: list[signal.Signals]) -> None:
        """Run the remaining optimizer steps; `arrived`: see [`stop_signals`]."""
        recipe, state = self.recipe, self.state
        batches = self._batches()
        self._clock = time.monotonic(), time.process_time()
        hidden = not self.accelerator.is_local_main_process
        if state.step == 0 and self.evaluates and recipe.evaluation.at_start and state.best_score is None:
            self._evaluate()
            self._tick()
            self._save()
        with tqdm(total=recipe.steps, initial=state.step, desc="training", unit="step", disable=hidden) as bar:
            while state.step < recipe.steps and not self._stopped_early():
                self._optimizer_step(batches)
                state.step += 1
                self._tick()
                bar.update()
                is_last = state.step == recipe.steps
                if is_last or state.step % recipe.log_interval == 0:
                    bar.set_postfix(loss=f"{self._log():.4g}")
                improved = False
                if self.evaluates and (is_last or state.step % recipe.evaluation.interval == 0):
                    improved = self._evaluate()
                    self._tick()
                    is_last = is_last or self._stopped_early()
                stop = self._any(bool(arrived))
                if improved or is_last or stop or state.step % recipe.checkpoint.interval == 0:
                    self._save()
                if stop and not is_last:
                    number = arrived[0] if arrived else signal.SIGTERM  # where only another process was told
                    self._say(f"Stopped by {number.name} after step {state.step}; the same command continues.")
                    self._end()
                    raise Terminated(number)

    def finish(self, command: str) -> dict[str, Any]:
        """Export the model and write `result.json`; of a run that was over already, both stay as they are."""
        recipe, state = self.recipe, self.state
        earlier = self.folder.result()
        if earlier is not None and earlier["steps"] == state.step == self._began_at:
            self._say(f"This run was over already: {self.folder.model} stays as it is.")
            self._end()
            return earlier
        wanted = state.best_step if recipe.export.weights == "best" and state.best_step is not None else state.step
        result = {
            "steps": state.step,
            "seconds": round(state.seconds, 1),
            "cpu_seconds": round(state.cpu_seconds, 1),
            "best_step": state.best_step,
            f"best_{self.score_name}": state.best_score,
            "exported_step": wanted,
            "trainable_parameters": trainable_parameters(self.trained),
            "processes": self.accelerator.num_processes,
            **{
                f"initial_{name}": value
                for name, value in self.folder.evaluation_of(0).items()
                if name == self.score_name
            },
            **self.folder.evaluation_of(wanted),
        }
        if wanted != state.step:
            self.store.load(self.accelerator, self.wrapped, self.optimizer, wanted)
        weights = self.exported_weights(self.accelerator.get_state_dict(self.wrapped))
        self._on_main(
            lambda: export_model(
                self.folder.model,
                self.model,
                weights,
                self.processor,
                recipe,
                {**result, **self.code, "command": command},
                class_names=self.class_names_shown(),
                data=self.describe_data(),
            )
        )
        self._on_main(lambda: self.folder.write_result(result))
        self._say(f"Exported step {wanted} to {self.folder.model}.")
        self._end()
        return result

    def _end(self) -> None:
        # the wrapper first: freed after its process group it hangs
        del self.wrapped, self.optimizer
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _tick(self) -> None:
        """Add the time since the last call to the state's."""
        (wall, cpu), self._clock = self._clock, (time.monotonic(), time.process_time())
        self.state.seconds += self._clock[0] - wall
        self.state.cpu_seconds += self._clock[1] - cpu

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        accelerator, recipe = self.accelerator, self.recipe
        order = StepBatches(
            self.state.step,
            recipe.steps,
            recipe.batch_size,
            recipe.accumulation,
            accelerator.process_index,
            accelerator.num_processes,
        )
        on_gpu = accelerator.device.type == "cuda"
        return iter(training_loader(self.samples, order, self.make_batch, recipe.num_workers, on_gpu))

    def _optimizer_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        accelerator, recipe, step = self.accelerator, self.recipe, self.state.step
        set_learning_rates(self.optimizer, learning_rate_factor(recipe.schedule, step, recipe.steps))
        figures: dict[str, torch.Tensor] = {}
        micro_batches = [
            {key: value.to(accelerator.device) for key, value in next(batches).items()}
            for _ in range(recipe.accumulation)
        ]
        for micro_batch, batch in enumerate(micro_batches):
            seed_step(recipe.seed, step, micro_batch, accelerator.process_index)
            with accelerator.accumulate(self.wrapped), accumulated_batches(micro_batches):
                outputs = self.wrapped(**batch, **self.constants)
                accelerator.backward(outputs.loss)
                for name, value in {"loss": outputs.loss, **outputs.loss_dict}.items():
                    figures[name] = figures.get(name, 0) + value.detach().double() / recipe.accumulation
                if accelerator.sync_gradients and recipe.clip_grad_norm is not None:
                    norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), recipe.clip_grad_norm)
                    if norm is not None:  # DeepSpeed clips by itself and tells nobody
                        figures["grad_norm"] = norm.detach().double()
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.after_step()
        if not torch.isfinite(figures["loss"]):
            raise FloatingPointError(f"The loss is {figures['loss'].item()} at optimizer step {step + 1}. {DIVERGED}")
        names = list(figures)
        values = accelerator.reduce(torch.stack([figures[name].float() for name in names]), reduction="mean")
        for name, value in zip(names, values.tolist(), strict=True):
            self.state.sums[name] = self.state.sums.get(name, 0.0) + value
        self.state.count += 1

    def _save(self) -> None:
        """Write a checkpoint of weights that are numbers.

        Raises:
            FloatingPointError: they are not: a loss may be finite and its gradient not.
        """
        trained = (parameter for parameter in self.trained.parameters() if parameter.requires_grad)
        parts = (part.to_local() if isinstance(part, DTensor) else part for part in trained)
        if self._any(not all(torch.isfinite(part).all() for part in parts)):
            raise FloatingPointError(f"Weights are NaN or infinite after optimizer step {self.state.step}. {DIVERGED}")
        self.store.save(self.accelerator, self.wrapped, self.optimizer, self.state)

    def _log(self) -> float:
        """Write the means since the last line; returns the loss."""
        state = self.state
        means = {name: total / state.count for name, total in state.sums.items()}
        state.sums, state.count = {}, 0
        factor = learning_rate_factor(self.recipe.schedule, state.step - 1, self.recipe.steps)
        rate = {"lr": factor * self.recipe.optimizer.lr}
        self._track({f"train/{name}": value for name, value in {**means, **rate}.items()})
        speed = state.step * self.recipe.batch_size / state.seconds
        for tracker in self.accelerator.trackers:
            if not isinstance(tracker, JSONLinesTracker):  # its file holds nothing that depends on the machine
                tracker.log({"speed/pictures_per_second": speed}, step=state.step)
        return means["loss"]

    def _evaluate(self) -> bool:
        """Evaluate and log; whether the score is the best so far.

        Raises:
            ValueError: there is no score, so that none could be better.
        """
        state, started = self.state, time.monotonic()
        with whole_weights(self.wrapped):
            figures = self.evaluate()
        score = figures[self.score_name]
        if math.isnan(score):
            raise ValueError(
                f"The evaluation has no {self.score_name}: none of its pictures has a labelled pixel. Label them, or "
                "evaluate on others (another seed holds out others)."
            )
        self._track({f"evaluation/{name}": value for name, value in figures.items()})
        self._say(f"step {state.step}: {self.score_name} {score:.4f} ({time.monotonic() - started:.0f} s)")
        improved = state.best_score is None or score > state.best_score
        if improved:
            state.best_score, state.best_step, state.evaluations_without_gain = score, state.step, 0
        else:
            state.evaluations_without_gain += 1
        return improved

    def _stopped_early(self) -> bool:
        patience = self.recipe.evaluation.patience
        return patience is not None and self.state.evaluations_without_gain >= patience

    def _start_trackers(self) -> None:
        folder = self.folder.path
        log_with, options = build_trackers(self.recipe.trackers, folder, self.state.step if self.continues else None)
        # accelerate wants them at construction, when the step to continue from is not known yet
        self.accelerator.log_with = log_with
        self.accelerator.project_configuration.set_directories(str(folder))
        self.accelerator.init_trackers("trackers", init_kwargs=options)

    def _track(self, values: dict[str, Any]) -> None:
        self.accelerator.log(values, step=self.state.step)

    def _any(self, flag: bool) -> bool:
        """Whether it is set on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        count = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device))
        return bool(count.item())

    def _on_main(self, action: Any) -> None:
        """Run `action` on the main process; its error ends all processes."""
        error = None
        if self.accelerator.is_main_process:
            try:
                action()
            except Exception as caught:
                error = caught
        outcome = broadcast_object_list([error]) if self.accelerator.num_processes > 1 else [error]
        if outcome[0] is not None:
            raise outcome[0]

    def _bar(self, description: str) -> Any:
        disable = not self.accelerator.is_local_main_process
        return functools.partial(tqdm, desc=description, unit="picture", leave=False, disable=disable)

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message)


def deepspeed_values(recipe: Any, processes: int) -> dict[str, Any]:
    """What DeepSpeed's configuration has to say for the recipe to count, where accelerate asks a data loader."""
    return {
        "train_micro_batch_size_per_gpu": recipe.batch_size // (recipe.accumulation * processes),
        "gradient_accumulation_steps": recipe.accumulation,
        # none is written as zero
        "gradient_clipping": recipe.clip_grad_norm or 0.0,
    }
