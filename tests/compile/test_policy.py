"""Compiling is done where it pays, which a run says; and a run that goes on keeps to what it began with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from onym.compile.in_place import Compilation
from onym.compile.policy import Costs, choose, recall, remember
from tests.conftest import TINY_RUN, Run

SHAPE = {"n_layers": 2}


@pytest.mark.parametrize(
    ("steps", "eager_seconds", "known", "how"),
    [
        (0, 9.0, {}, "off"),
        (20, 0.1, {}, "off"),
        (10_000, 0.1, {}, "whole"),
        (1_100, 0.105, {}, "whole"),  # the default run on two cores
        (1_000, 0.15, {"whole": Costs(200.0, 0.25), "blocks": Costs(20.0, 0.2)}, "blocks"),  # where the whole takes very long
        (60, 0.1, {"whole": Costs(1.0, 0.3)}, "whole"),  # where its code is there already
        (10_000, 0.1, {"whole": Costs(30.0, -0.1), "blocks": Costs(10.0, 0.0)}, "off"),  # where it does not help
    ],
)
def test_what_leaves_most_time_is_chosen(steps: int, eager_seconds: float, known: dict, how: str) -> None:  # type: ignore[type-arg]
    assert choose(steps, eager_seconds, True, known) == how


def test_what_it_did_cost_and_save_is_known_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONYM_CACHE_DIR", str(tmp_path))
    assert recall(SHAPE) == {}
    remember(SHAPE, Compilation("whole", 20.0, "", 1.0, 0.75))
    remember(SHAPE, Compilation("blocks", 10.0, "", 1.0, 0.9))
    remember(SHAPE, Compilation("off", 1.0, "", 1.0))
    remember({"n_layers": 9}, Compilation("whole", 20.0, "", 1.0, 1.2))
    assert recall({"n_layers": 9}) == {}, "a busy machine is no reason never to compile again"
    found = recall(SHAPE)
    assert {how: costs.saved for how, costs in found.items()} == {"whole": 0.25, "blocks": pytest.approx(0.1)}
    assert found["whole"].seconds < 5, "what was compiled is found the next time"
    remember(SHAPE, Compilation("whole", 2.0, "", 1.0, 0.75))
    assert recall(SHAPE)["whole"] == Costs(2.0, 0.25)
    assert recall({"n_layers": 3}) == {}


@pytest.mark.parametrize("text", ["", "[]", '{"x": 1}', "{", '{"a": {"whole": {"seconds": "1", "saved": 2.0}}}'])
def test_a_damaged_memory_is_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONYM_CACHE_DIR", str(tmp_path))
    remember(SHAPE, Compilation("whole", 20.0, "", 1.0, 0.75))
    (file,) = (tmp_path / "compiled").glob("*.json")
    file.write_text(text)
    assert recall(SHAPE) == {}
    remember(SHAPE, Compilation("whole", 20.0, "", 1.0, 0.75))
    assert recall(SHAPE)


def test_a_short_run_is_not_compiled_and_says_how_it_would_be(onym: Run, book: Path) -> None:
    done = onym("train", "--data", book, *TINY_RUN, "--steps", 3)
    assert done.returncode == 0, done.stderr
    assert re.search(r"First step: without compilation: it would not pay in 3 steps \(--compile whole does it\)", done.stdout)


def test_a_run_that_pays_is_compiled_says_when_and_goes_on_so(
    onym: Run, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onym.train.dry_run.choose", lambda *_: "whole")
    command = (
        "train",
        "--data",
        book,
        *TINY_RUN,
        "--steps",
        100_000,
        "--eval-every",
        1000,
        "--time-limit",
        "2s",
        "--name",
        "long",
    )
    done = onym(*command)
    assert done.returncode == 75, done.stderr
    told = re.search(
        r"Compiling: the whole model in place; every name stays as it is(; took \d+ s and saves [\d.e-]+ s a step)?",
        done.stdout,
    )
    assert told or "a compiled step takes longer here" in done.stdout, done.stdout
    began = json.loads((tmp_path / "runs/long/run.json").read_text())["compiled"]
    monkeypatch.setattr("onym.train.dry_run.choose", lambda *_: pytest.fail("decided again"))
    done = onym(*command)
    assert done.returncode == 75, done.stderr
    assert json.loads((tmp_path / "runs/long/run.json").read_text())["compiled"] == began
