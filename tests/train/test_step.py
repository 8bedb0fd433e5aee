"""One step: split or whole, with its activations kept or not, averaged, and as much at once as fits."""

from __future__ import annotations

import functools
import gc
import re
import subprocess
import sys
import weakref

import pytest
import torch

from onym import GPT
from onym.compile.in_place import graphs_compiled
from onym.data.batches import Batch
from onym.errors import is_out_of_memory
from onym.train import dry_run
from onym.train.distributed import DistContext
from onym.train.dry_run import prepare
from onym.train.options import OptimizationOptions
from onym.train.precision import Compute, choose_compute
from onym.train.step import Stepper
from tests.conftest import TINY

CPU = Compute(torch.device("cpu"), torch.float32)


def trained(micro_batch: int = 4, steps: int = 3, **options: object) -> Stepper:
    torch.manual_seed(0)
    stepper = Stepper(GPT(TINY), OptimizationOptions(**options), CPU)  # type: ignore[arg-type]
    prepare(stepper, batch(0), [micro_batch], "off")
    for number in range(steps):
        stepper(batch(number), 1e-3, number)
    return stepper


def batch(number: int) -> Batch:
    tokens = torch.randint(0, TINY.vocab_size, (4, TINY.context_length + 1), generator=torch.Generator().manual_seed(number))
    return tokens[:, :-1], tokens[:, 1:]


def test_parts_add_up_to_the_whole() -> None:
    whole, split = trained(4).model.state_dict(), trained(1).model.state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=0, atol=2e-4, msg=name)


def test_the_preparation_changes_nothing() -> None:
    torch.manual_seed(0)
    model = GPT(TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    stepper = Stepper(model, OptimizationOptions(), CPU)
    prepare(stepper, batch(0), [4], "off")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(optimizer.state for optimizer in stepper.optimizers)


def test_recomputed_activations_give_the_same_bits() -> None:
    kept, recomputed = trained(), trained(gradient_checkpointing=True)
    for name, tensor in kept.model.state_dict().items():
        assert torch.equal(recomputed.model.state_dict()[name], tensor), name


def test_the_average_follows_the_weights() -> None:
    stepper = trained(steps=0, ema=0.5)
    assert stepper.average is not None
    expected = {name: tensor.clone() for name, tensor in stepper.model.named_parameters()}
    for number in range(6):
        stepper(batch(number), 1e-2, number)
        decay = min(0.5, (1 + number) / (10 + number))
        for name, tensor in stepper.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.detach()
    for name, tensor in stepper.average.model.named_parameters():
        torch.testing.assert_close(tensor.detach(), expected[name])


def test_muon_takes_the_matrices_of_the_blocks_alone() -> None:
    stepper = trained(optimizer="muon", steps=1)
    muon, adamw = stepper.optimizers
    names = {id(parameter): name for name, parameter in stepper.model.named_parameters()}
    taken = [names[id(parameter)] for group in muon.param_groups for parameter in group["params"]]
    rest = [names[id(parameter)] for group in adamw.param_groups for parameter in group["params"]]
    assert sorted(taken + rest) == sorted(names.values())
    assert all(name.startswith("trf_blocks.") and name.endswith("weight") and "norm" not in name for name in taken)
    assert len(taken) == 4 * TINY.n_layers


def test_as_much_as_fits_goes_through_at_once() -> None:
    """A process with a quarter of a gigabyte more than it starts with, and a batch that needs twice as much."""
    program = """
import resource, torch
from onym import GPT, GPTConfig
from onym.train.dry_run import prepare
from onym.train.options import OptimizationOptions
from onym.train.precision import Compute
from onym.train.step import Stepper
torch.set_num_threads(1)
model = GPT(GPTConfig.preset("nano", vocab_size=20_000))
stepper = Stepper(model, OptimizationOptions(), Compute(torch.device("cpu"), torch.float32))
tokens = torch.zeros(128, 128, dtype=torch.int64)
prepare(stepper, (tokens[:1], tokens[:1]), [1], "off")  # what is allocated once
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
prepare(stepper, (tokens, tokens), [128, 64, 32, 16, 8, 4, 2, 1], "off")
print(stepper.micro_batch)
"""
    if sys.platform != "linux":
        pytest.skip("the limit of memory is Linux's")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in (2, 4, 8, 16, 32, 64)


def test_a_run_that_is_resumed_needs_no_more_memory_than_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    compile_ = dry_run._DryRun.compile

    def counting(self: dry_run._DryRun, *how: object) -> object:
        reserved.append(sum(each.numel() for each in self.moments))
        return compile_(self, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(dry_run._DryRun, "compile", counting)
    stepper = trained()
    prepare(stepper, batch(0), [4], "off")
    assert reserved == [2 * sum(each.numel() for each in stepper.model.parameters()), 0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_ran_out_of_memory_is_freed_before_less_is_tried(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = Stepper(GPT(TINY), OptimizationOptions(), CPU)
    if world_size > 1:  # as one of several, which all have the same luck
        monkeypatch.setattr(DistContext, "max", lambda _, value: value)
        monkeypatch.setattr(DistContext, "mean", lambda _, value: value)
        stepper.ranks = DistContext(1, world_size)
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    loss_of = stepper._loss

    def running_out(part: Batch) -> torch.Tensor:
        if len(part[0]) < 4:
            alive.append(any(each() is not None for each in held))
            return loss_of(part)
        failed = torch.zeros(10)
        held.append(weakref.ref(failed))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(stepper, "_loss", running_out)
    gc.disable()  # which would find a cycle in the end, by chance
    try:
        prepare(stepper, batch(0), [4, 2], "off")
    finally:
        gc.enable()
    assert stepper.micro_batch == 2
    assert alive[0] is False


def test_every_size_that_is_tried_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles the same lines for eight shapes, and runs the ninth as it is."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    stepper = Stepper(GPT(TINY), OptimizationOptions(), CPU)
    tokens = torch.zeros(24, TINY.context_length, dtype=torch.long)
    backward, compiled = torch.Tensor.backward, list[int]()

    def running_out(self: torch.Tensor) -> None:
        if stepper.micro_batch > 1:
            compiled.append(graphs_compiled())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        backward(self)

    monkeypatch.setattr(torch.Tensor, "backward", running_out)
    before = graphs_compiled()
    prepare(stepper, (tokens, tokens), [24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 1], "whole")
    assert len({before, *compiled, graphs_compiled()}) == 12


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_a_lack_of_memory_is_known_by_what_cuda_says(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError(words)

    assert is_out_of_memory(RuntimeError(words))
    monkeypatch.setattr(torch, "ones", failing)
    with pytest.raises(RuntimeError, match=re.escape(words)):  # not that there is no such device
        choose_compute("cpu", "auto")


@pytest.mark.parametrize(("size", "passes"), [(4, 1), (2, 2), (1, 2)])
def test_the_preparation_takes_the_memory_of_gradients_that_add_up(tiny: GPT, size: int, passes: int) -> None:
    """The second part goes through the model while the gradients of the first are there."""
    before: list[bool] = []
    tiny.register_forward_pre_hook(lambda *_: before.append(tiny.tok_emb.weight.grad is not None))
    prepare(Stepper(tiny, OptimizationOptions(), CPU), batch(0), [size], "off")
    assert before == [False, True][:passes]


def test_the_average_does_not_move_at_a_step_that_was_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = trained(ema=0.5)
    assert stepper.average is not None
    before = {name: tensor.clone() for name, tensor in stepper.average.model.named_parameters()}
    with monkeypatch.context() as patch:
        loss = stepper._loss
        patch.setattr(stepper, "_loss", lambda part: loss(part) * torch.nan)
        assert stepper(batch(3), 1e-2, 3).bad
    for name, tensor in stepper.average.model.named_parameters():
        assert torch.equal(tensor, before[name]), name
    assert not stepper(batch(4), 1e-2, 4).bad
    assert any(not torch.equal(tensor, before[name]) for name, tensor in stepper.average.model.named_parameters())
