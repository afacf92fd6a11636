"""Two processes and one process with the same global batch, every method in every stage that is trained; activation
checkpointing; and mixed precision."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from ov_segmentation.losses import accumulated_batches
from ov_segmentation.strict_mapping import RecipeError
from ov_segmentation.training.sharding import make_shardable, whole_weights
from ov_segmentation.training.trainable import select_trainable
from tests.methods import CASE_OF

ROOT = Path(__file__).parents[1]
BATCH = 4
STAGES = [(method, stage) for method, case in CASE_OF.items() for stage in case.stages]
# low-rank updates go through the same wrapper, but their layers are others
CASES = [*((method, stage, "method") for method, stage in STAGES), ("cat_seg", "", "lora"), ("sed", "", "lora")]


def build(method: str, stage: str, trainable: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model in training mode and a batch whose last picture has no labels at all."""
    case = CASE_OF[method]
    model = case.model(stage).train()
    if hasattr(model.config, "ignore_as_negative"):
        model.config.ignore_as_negative = False  # so that the parts of the batch have different normalisers
    torch.manual_seed(1)
    select_trainable(model, trainable)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and with it the gradient of the other factor
                parameter.normal_(std=0.1)
    inputs = case.inputs(model, BATCH)
    inputs["labels"][-1] = -100
    return model, inputs


def part(method: str, inputs: dict[str, torch.Tensor], index: int, count: int) -> dict[str, torch.Tensor]:
    """One of `count` equal parts of a batch."""
    per_picture = CASE_OF[method].tester().pictures(1).keys() | {"labels", "sample_seeds"}
    size = len(inputs["labels"]) // count
    share = slice(index * size, (index + 1) * size)
    return {name: value[share] if name in per_picture else value for name, value in inputs.items()}


def step(model: torch.nn.Module, *micro_batches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss and gradients."""
    loss = torch.zeros(())
    with accumulated_batches(micro_batches):
        for inputs in micro_batches:
            of_part = model(**inputs).loss / len(micro_batches)
            of_part.backward()
            loss += of_part.detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, **gradients}


def file_name(kind: str, case: tuple[str, str, str]) -> str:
    return "-".join((kind, *case)) + ".safetensors"


def work(folder: Path) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    for case in CASES:
        model, inputs = build(*case)
        mine = part(case[0], inputs, rank, size)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        results = {"ddp": step(wrapped, mine)}
        wrapped.zero_grad()
        results["accumulated"] = step(wrapped, *(part(case[0], mine, index, 2) for index in range(2)))
        del wrapped  # before its process group, or it hangs
        sharded, _ = build(*case)
        make_shardable(sharded)
        fully_shard(sharded, mesh=mesh)
        found = step(sharded, mine)
        results["fsdp2"] = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in found.items()}
        with whole_weights(sharded), torch.no_grad():  # as an evaluation runs
            results["fsdp2"]["evaluated"] = type(sharded).forward(sharded, **inputs).loss
        for kind, values in results.items():
            distributed.all_reduce(values["loss"])
            values["loss"] /= size
            if rank == 0:
                values = {name.removeprefix("module."): value.contiguous() for name, value in values.items()}
                save_file(values, folder / file_name(kind, case))
        distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One start of two processes for all methods: importing them takes longer than what they compute."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.test_several_processes", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """To `tolerance` of each tensor's largest element, or of 1 where that is less."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def count_calls(model: torch.nn.Module) -> tuple[set[str], Counter[str]]:
    """Names of layers that can be checkpointed and are called as a whole from now on (value paths and severed blocks
    call their parts), and how often the parts of each run; hooks of the layer itself stay outside of what is computed
    again."""
    called: set[str] = set()
    calls: Counter[str] = Counter()
    for name, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
            for part in list(layer.modules())[1:]:
                part.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return called, calls


class StepTester:
    """Subclass it with a method's key in `CASE_OF`."""

    method: ClassVar[str]

    @property
    def cases(self) -> list[tuple[str, str, str]]:
        return [case for case in CASES if case[0] == self.method]

    def test_two_processes_equal_one(self, of_two_processes: Path) -> None:
        for case in self.cases:
            expected = step(*build(*case))
            assert any(value.any() for name, value in expected.items() if name != "loss"), case
            assert_close(load_file(of_two_processes / file_name("ddp", case)), expected, 1e-5)
            assert_close(load_file(of_two_processes / file_name("accumulated", case)), expected, 1e-5)

    def test_two_processes_that_share_the_weights_out_equal_one(self, of_two_processes: Path) -> None:
        """FSDP2, the whole model as one unit. Each process evaluates the whole batch, but divides by global sums."""
        for case in self.cases:
            expected = step(*build(*case))
            found = load_file(of_two_processes / file_name("fsdp2", case))
            evaluated = found.pop("evaluated")
            assert_close(found, expected, 1e-5)
            assert evaluated.isfinite() and evaluated > 0

    def test_accumulated_micro_batches_equal_one_batch(self) -> None:
        """One of them has a picture without labels."""
        for case in self.cases:
            model, inputs = build(*case)
            expected = step(model, inputs)
            model.zero_grad()
            assert_close(step(model, *(part(self.method, inputs, index, 2) for index in range(2))), expected, 1e-5)

    def test_activations_are_computed_again_and_gradients_are_the_same(self) -> None:
        for case in self.cases:
            model, inputs = build(*case)
            called, calls = count_calls(model)
            plain, once = step(model, inputs), Counter(calls)
            calls.clear()
            model.zero_grad()
            model.gradient_checkpointing_enable()
            assert_close(step(model, inputs), plain, 1e-6)
            # more calls, not twice as many: what nobody needs of a layer's last parts is not computed again
            again = {name for name in called if calls[name] > once[name]}
            trained = {name for name in called if any(key.startswith(f"{name}.") for key in plain)}
            assert again >= trained and again, (case, trained - again)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_mixed_precision_keeps_loss_and_weights_in_full_precision(self, dtype: torch.dtype) -> None:
        for case in self.cases:
            model, inputs = build(*case)
            expected = step(model, inputs)["loss"]
            model.zero_grad()
            with torch.autocast("cpu", dtype):
                outputs = model(**inputs)
            assert {value.dtype for value in outputs.loss_dict.values()} == {torch.float32}, case
            outputs.loss.backward()
            assert outputs.loss.item() == pytest.approx(expected.item(), rel=0.05), case
            for name, parameter in model.named_parameters():
                assert parameter.dtype == torch.float32
                assert parameter.grad is None or parameter.grad.isfinite().all(), (case, name)


class TestSAN(StepTester):
    method = "san"


class TestOVSeg(StepTester):
    method = "ovseg"


class TestDeOP(StepTester):
    method = "deop"


class TestSED(StepTester):
    method = "sed"


class TestCATSeg(StepTester):
    method = "cat_seg"


class TestESCNet(StepTester):
    method = "esc_net"


def test_a_single_number_cannot_be_shared_out() -> None:
    model = CASE_OF["san"].model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_shardable(model)
    assert "clip.logit_scale" in dict(model.named_buffers())
    assert model.state_dict().keys() == before.keys()
    model = CASE_OF["san"].model()
    select_trainable(model, ["logit_scale"])
    with pytest.raises(RecipeError, match=r"clip\.logit_scale is a single number"):
        make_shardable(model)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    # Everything is written. torch's caches of DTensors hold on to the process group, whose threads would live into the
    # interpreter's end; a process that aborts there (as one did in CI, "terminate called without an active exception")
    # would take the results with it.
    os._exit(0)
