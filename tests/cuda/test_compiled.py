"""Compiled in place on a GPU: once, for the whole of a run; the same losses and gradients as without."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from onym import GPT, GPTConfig
from onym.compile.in_place import graphs_compiled
from onym.gpt.documents import documents_of
from tests.cuda.conftest import TrainedRun
from tests.cuda.training import new_stepper, on
from tests.gpt.test_documents import gradients

END = 0


@pytest.mark.cuda
def test_a_run_is_compiled_before_its_first_step_and_never_again(compiled_run: TrainedRun) -> None:
    """Through training, evaluation, samples, checkpoints, and the last step."""
    assert "in place; every name stays as it is" in compiled_run.said
    assert "compiled again" not in compiled_run.said
    assert len(compiled_run.graphs) == 12
    assert compiled_run.graphs[0] > 0
    assert set(compiled_run.graphs) == {compiled_run.graphs[0]}
    assert len(list((compiled_run.path / "samples").iterdir())) == 4


@pytest.mark.cuda
def test_its_figures_are_numbers(compiled_run: TrainedRun) -> None:
    rows = [json.loads(line) for line in (compiled_run.path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    for row in rows[1:]:
        assert all(math.isfinite(row[name]) for name in ("train_loss", "grad_norm", "tokens_per_second", "data_wait"))
        assert row["tokens_per_second"] > 0


def test_with_recomputed_activations_it_learns_the_same(
    device: torch.device, quick_compiler: Callable[[torch.device], None]
) -> None:
    quick_compiler(device)
    losses, graphs = {}, []
    for how in ("off", "whole"):
        stepper = new_stepper(device, how=how, gradient_checkpointing=how == "whole", micro_batch=2, optimizer="adamw")
        graphs.append(graphs_compiled())
        losses[how] = [float(stepper(on(device, 0), 1e-2, number).loss) for number in range(6)]
    assert losses["off"][-1] < losses["off"][0] - 0.2
    assert losses["whole"] == pytest.approx(losses["off"], abs=1e-3)
    assert graphs_compiled() == graphs[-1], "all micro-batches and steps run what was compiled for the first"
    assert graphs[-1] > graphs[0]


@pytest.mark.parametrize("time", [64, 200])
def test_documents_apart_in_a_compiled_model_have_the_losses_and_gradients_of_the_mask(
    device: torch.device, quick_compiler: Callable[[torch.device], None], time: int
) -> None:
    """Compiled for a GPU, attention is a kernel that skips what a document does not see; of rows that end inside of its blocks
    of 128 tokens, and of rows that are shorter than one."""
    quick_compiler(device)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, context_length=time, emb_dim=32, n_heads=2, n_layers=2)).to(device)
    with torch.no_grad():  # so large that attention looks at something
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.dim() > 1 else parameter.normal_(std=0.5)
    batches = [rows(time, seed).to(device) for seed in range(3)]

    def measured(tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = model(tokens[:, :-1], tokens[:, 1:], documents=documents_of(tokens[:, :-1], END))
        loss.backward()
        return loss.detach(), gradients(model)

    expected = [measured(tokens) for tokens in batches]
    graphs = graphs_compiled()
    model.compile(fullgraph=True, dynamic=False)
    for tokens, (loss, wanted) in zip(batches, expected, strict=True):
        found, slopes = measured(tokens)
        torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-5)
        for name, gradient in slopes.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
    assert graphs_compiled() == graphs + 1, "one graph, wherever documents end"


def rows(time: int, seed: int) -> Tensor:
    """[3, time + 1], in which documents end now and then."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 31, (3, time + 1), generator=generator) * (
        torch.rand(3, time + 1, generator=generator) > 0.05 * seed
    )
