"""The ladder: its rungs are one model, each has a figure or a reason, and one that fails costs no other."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from onym import GPT, GPTConfig
from onym.errors import ConfigError
from onym.tools.ladder import ladder as module
from onym.tools.ladder.ladder import RUNGS, Figure, Ladder, climb
from onym.tools.ladder.model import LadderModel, Technique
from onym.tools.ladder.process import Setting, command_of
from onym.train.display import Display
from onym.train.precision import Compute

SHAPE = GPTConfig(vocab_size=101, context_length=16, emb_dim=32, n_heads=4, n_layers=2)
CPU = Compute(torch.device("cpu"), torch.float32)
FIRST, MASK, FUSED = (next(r for r in RUNGS if r.technique == name) for name in (None, "mask", "fused"))
BATCH = next(rung for rung in RUNGS if rung.technique == "batch")


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TURN", 0.01)


# As they are added, one after another; TF32, bf16, the optimizer and compilation are not the model's.
PARTS: list[tuple[Technique, ...]] = [
    (),
    ("mask",),
    ("mask", "norm"),
    ("mask", "norm", "attention"),
    ("mask", "norm", "attention", "padding"),
]


@torch.no_grad()
def take_weights(model: LadderModel, other: Mapping[str, torch.Tensor]) -> None:
    """Copy the weights of a rung that has q, k and v apart, whatever form this one has them in."""
    for name, parameter in model.named_parameters():
        if ".qkv." in name:
            parameter.copy_(torch.cat([other[name.replace(".qkv.", f".{part}.")] for part in ("query", "key", "value")]))
        else:
            parameter[: other[name].shape[0]].copy_(other[name])  # all rows, or those that are no padding


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids=range(len(PARTS)))
def test_every_rung_computes_the_same_function(parts: tuple[Technique, ...], bias: bool, tokens: torch.Tensor) -> None:
    shape = replace(SHAPE, qkv_bias=bias)
    tokens = tokens[:, : shape.context_length - 3]
    first, this = LadderModel(shape, ()), LadderModel(shape, parts)
    take_weights(this, first.state_dict())
    logits = this(tokens)
    assert logits.shape[-1] == (128 if "padding" in parts else 101)
    logits = logits[..., : shape.vocab_size]  # rows that pad are no tokens
    torch.testing.assert_close(logits, first(tokens), rtol=1e-4, atol=1e-4)
    losses = [F.cross_entropy(each.flatten(0, 1), tokens.flatten()) for each in (logits, first(tokens))]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for name in ("pos_emb.weight", "blocks.0.norm1.weight", "blocks.1.ff.0.bias", "blocks.1.att.proj.weight"):
        gradients = [model.get_parameter(name).grad for model in (this, first)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_last_of_them_is_onyms_own_model(tokens: torch.Tensor) -> None:
    tokens = tokens[:, : SHAPE.context_length]
    ours, theirs = GPT(SHAPE), LadderModel(SHAPE, PARTS[3])
    state = {
        name.replace("trf_blocks", "blocks").replace("ff.layers", "ff"): weights for name, weights in ours.state_dict().items()
    }
    theirs.load_state_dict(state, strict=True)
    torch.testing.assert_close(theirs(tokens), ours(tokens))


def test_what_needs_another_machine_says_so() -> None:
    reasons = {rung.technique: rung.why_not(CPU) for rung in RUNGS}
    assert reasons.pop("tf32") == "TF32 is a mode of NVIDIA's GPUs, and the CPU computes here"
    assert "pinned memory speeds up copies to an NVIDIA GPU" in (reasons.pop("pinned") or "")
    assert "no bf16 arithmetic" in (reasons.pop("bf16") or "")
    assert set(reasons.values()) == {None}
    assert next(rung for rung in RUNGS if rung.technique == "bf16").why_not(replace(CPU, dtype=torch.bfloat16)) is None


def test_a_setting_reaches_its_process_as_it_is() -> None:
    setting = Setting(SHAPE, 4, "cpu", ("mask", "bf16", "padding"))
    assert Setting.from_dict(json.loads(json.dumps(setting.to_dict()))) == setting


# Answers as a rung's process does, so many turns long, and then dies without a word.
ANSWERS = """
import sys
print('{"ready": 0.1}', flush=True)
for _ in range(%d):
    sys.stdin.readline()
    print('{"seconds": 0.1, "memory": 1000}', flush=True)
sys.stdin.readline()
print("no more of it", file=sys.stderr)
sys.exit(7)
"""
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def instead_of(technique: str, program: str) -> Callable[[Setting], list[str]]:
    """Another program for one rung's process."""

    def command(setting: Setting) -> list[str]:
        last = setting.techniques[-1] if setting.techniques else None
        return [sys.executable, "-c", program] if last == technique else command_of(setting)

    return command


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (KILLED, "its process was ended by SIGKILL, as a system short of memory does"),
        (ANSWERS % 1, "its process ended with code 7: no more of it"),
        (
            """print('{"failed": "torch.compile does not work here: no compiler"}')""",
            "torch.compile does not work here: no compiler",
        ),
    ],
    ids=["killed at the start", "dead in its second turn", "no compiler"],
)
def test_a_rung_whose_process_dies_is_told_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str, reason: str
) -> None:
    monkeypatch.setattr(module, "command_of", instead_of("mask", program))
    ladder = climb(SHAPE, 2, CPU, 2, Display(), rungs=(FIRST, MASK, FUSED))
    first, mask, fused = ladder.figures
    assert mask.reason == reason
    assert mask.tokens_per_second is None
    assert f" 2 mask made on the fly: skipped: {reason}" in capsys.readouterr().out
    assert first.factor is None
    assert first.total == 1.0
    assert fused.factor is not None
    assert fused.total == fused.factor, "compared with the last rung that has a figure"
    assert fused.pairs > 1
    assert (fused.a100_factor, fused.a100_total) == (28_399 / 12_526, 28_399 / 12_525), "the book's had it"


def test_a_rung_that_dies_while_the_next_is_measured_keeps_its_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "command_of", instead_of("mask", ANSWERS % module._MOST_PAIRS))
    _, mask, fused = climb(SHAPE, 2, CPU, 2, Display(), rungs=(FIRST, MASK, FUSED)).figures
    assert mask.tokens_per_second == pytest.approx(2 * 16 / 0.1)
    assert mask.memory_bytes == 1000
    assert fused.tokens_per_second is not None
    assert fused.factor == pytest.approx(fused.tokens_per_second / mask.tokens_per_second)


def test_without_a_first_rung_there_is_no_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "command_of", lambda _: [sys.executable, "-c", KILLED])
    with pytest.raises(ConfigError, match=r"The first rung has no figure, .*ended by SIGKILL"):
        climb(SHAPE, 2, CPU, 2, Display())


def test_a_batch_that_may_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "command_of", lambda _: [sys.executable, "-c", ANSWERS % 99])
    for free, batch, reason in (
        (7_999, 4, ""),  # two processes of twice 1000 bytes
        (8_000, 8, ""),
        (3_999, 0, "two processes that take 2.0 kB each may not fit into the 4.0 kB that are free"),
        (None, 8, ""),
    ):
        monkeypatch.setattr(module, "_free_memory", lambda _, free=free: free)
        _, larger = climb(SHAPE, 2, CPU, 2, Display(), rungs=(FIRST, BATCH)).figures
        assert larger.reason == reason
        assert larger.title == f"batch 2 to {batch or 8}"
        if batch:
            assert larger.tokens_per_second == pytest.approx(batch * 16 / 0.1)


def test_time_that_is_up_leaves_rungs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = """import time; print('{"ready": 0.1}', flush=True); time.sleep(60)"""
    monkeypatch.setattr(module, "command_of", lambda s: [sys.executable, "-c", waits if s.techniques else ANSWERS % 999])
    ladder = climb(SHAPE, 2, CPU, 0.03, Display(), rungs=(FIRST, MASK, FUSED))
    assert "give more --minutes" in ladder.figures[1].reason
    assert "give more --minutes" in ladder.figures[2].reason
    assert ladder.seconds < 3


def test_the_largest_gain_is_the_largest_factor() -> None:
    figures = (
        Figure(1, "first", "", tokens_per_second=10.0),
        Figure(2, "small", "", factor=1.1),
        Figure(3, "large", "", factor=1.3),
        Figure(4, "left out", "", reason="no"),
    )
    ladder = Ladder("x", SHAPE, 8, module.Peak(1e9, "measured"), 1.0, figures)
    assert ladder.largest_gain is figures[2]
    assert ladder.factor_of("mask") == 1.1
    assert replace(ladder, figures=figures[:1]).largest_gain is None
