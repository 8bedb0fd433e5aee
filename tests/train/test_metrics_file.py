"""metrics.jsonl in memory is the file, whatever happened to it between two readings; a short curve looks like the long one."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onym.train.downsample import downsample, visible
from onym.train.metrics_file import SERIES, UNITS, MetricsFile
from onym.train.run_folder import RunFolder
from onym.train.run_list import RunSummarizer

FIELDS = (*UNITS, *SERIES)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.integers(),
    st.integers(10**310, 10**311),
    st.floats(),
    st.lists(st.integers()),
)
ROWS = st.one_of(
    st.fixed_dictionaries(
        {"step": st.integers(0, 10**6), "train_loss": st.floats(0, 10), "val_loss": st.none() | st.floats(0, 9)}
    ),
    st.dictionaries(st.sampled_from([*FIELDS, "event", "other"]), VALUES),
    st.fixed_dictionaries({"event": st.sampled_from(["skipped-step", "rollback"]), "step": st.integers(0, 10**6)}),
    st.one_of(st.none(), st.integers(), st.lists(st.integers()), st.text()),
)
GARBAGE = st.sampled_from(["", "{", '{"step": 1', "}{", "[1, 2", "nonsense", '{"step": 1} {"step": 2}', "\\", "[" * 5000])
CHANGES = st.one_of(
    st.tuples(st.just("append"), st.lists(ROWS, max_size=6)),
    st.tuples(st.just("append without the last line's end"), st.lists(ROWS, min_size=1, max_size=3)),
    st.tuples(st.just("keep"), st.integers(0, 12)),
    st.tuples(st.just("cut"), st.integers(0, 400)),
    st.tuples(st.just("replace"), st.lists(ROWS, max_size=6)),
    st.tuples(st.just("garbage"), GARBAGE),
    st.tuples(st.just("delete"), st.none()),
)


def number(value: Any) -> float:
    if type(value) not in (int, float) or (type(value) is int and abs(value) > 10**300):
        return math.nan
    return float(value)


def rows_of(run: RunFolder) -> list[Any]:
    """What a full reading says. A last line that is complete but for its end may be there or not, so it is left out."""
    content = run.metrics.read_bytes() if run.metrics.exists() else b""
    with tempfile.TemporaryDirectory() as folder:
        whole = RunFolder(Path(folder))
        whole.metrics.write_bytes(content[: content.rfind(b"\n") + 1])
        return whole.read_metrics()


def assert_is(file: MetricsFile, run: RunFolder) -> None:
    rows = [row for row in rows_of(run) if isinstance(row, dict)]
    assert [str(event) for event in file.events()] == [str(row) for row in rows if "event" in row]
    plain = [row for row in rows if "event" not in row]
    assert file.rows == len(plain)
    for name in FIELDS:
        np.testing.assert_array_equal(file.column(name), [number(row.get(name)) for row in plain])


@given(st.lists(CHANGES, max_size=8))
def test_whatever_happens_to_the_file_what_was_read_is_what_a_full_reading_says(changes: list[tuple[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, serial = RunFolder(Path(folder)), 0
        file = MetricsFile(run.metrics)
        for kind, what in changes:
            # As in a real file, no two rows are alike: each has its time.
            if isinstance(what, list):
                serial += 1
                what = [{**row, "at": [serial, n]} if isinstance(row, dict) else row for n, row in enumerate(what)]
            if kind == "append":
                run.add_metrics(what)
            elif kind == "append without the last line's end":
                run.add_metrics(what)
                os.truncate(run.metrics, run.metrics.stat().st_size - 1)
            elif kind == "keep":
                run.keep_metrics(what)
            elif kind == "cut" and run.metrics.exists():
                os.truncate(run.metrics, max(0, run.metrics.stat().st_size - what))
            elif kind == "replace":
                with tempfile.TemporaryDirectory() as other:
                    RunFolder(Path(other)).add_metrics(what)
                    RunFolder(Path(other)).metrics.replace(run.metrics)
            elif kind == "garbage":
                with run.metrics.open("a") as out:
                    out.write(what + "\n")
                if what.startswith("[["):
                    file.update()  # raises nothing; json itself cannot say what such a line is
                    return
            elif kind == "delete":
                run.metrics.unlink(missing_ok=True)
            version = file.update()
            assert_is(file, run)
            assert file.update() == version, "nothing new, no new version"
            file.view("seconds", 5)


def test_only_what_is_new_is_read_and_a_rewritten_file_is_another_generation(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    file = MetricsFile(run.metrics)
    assert file.update() == file.version
    run.add_metrics({"step": step, "seconds": step * 0.5} for step in range(100))
    file.update()
    generation = file.generation
    run.add_metrics([{"step": 100, "seconds": 50}])
    file.update()
    assert (file.rows, file.generation) == (101, generation)
    run.keep_metrics(40)  # a resume
    file.update()
    assert file.rows == 40
    assert file.generation > generation


def test_a_file_with_the_inode_and_a_greater_size_of_the_old_one_is_another_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.add_metrics({"step": step, "seconds": 1.25} for step in range(5))
    file = MetricsFile(run.metrics)
    file.update()
    generation, inode = file.generation, run.metrics.stat().st_ino
    with run.metrics.open("r+b") as out:
        out.truncate()
    run.add_metrics({"step": step, "seconds": 2.25} for step in range(9))
    assert run.metrics.stat().st_ino == inode
    file.update()
    assert file.column("seconds").tolist() == [2.25] * 9
    assert file.generation > generation


def test_a_replaced_file_is_another_one_though_its_last_rows_are_the_same(tmp_path: Path) -> None:
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other")
    for folder, first in ((run, 1.0), (other, 2.0)):
        folder.path.mkdir()
        folder.add_metrics([{"step": 0, "train_loss": first}, *({"step": step, "train_loss": 5.0} for step in range(1, 50))])
    file = MetricsFile(run.metrics)
    file.update()
    other.metrics.replace(run.metrics)
    file.update()
    assert file.column("train_loss").tolist() == [2.0] + [5.0] * 49


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.update()
    assert file.rows == 0


@given(st.lists(st.floats(-1e9, 1e9), max_size=300), st.integers(2, 60))
def test_a_short_curve_has_the_ends_and_the_extremes_of_each_bucket(values: list[float], points: int) -> None:
    y = np.array(values)
    chosen = downsample(y, points)
    assert len(chosen) <= max(points, 0)
    assert (np.diff(chosen) > 0).all()
    if not values:
        return
    assert {0, len(y) - 1} <= set(chosen.tolist())
    if points >= 4:
        assert y[chosen].min() == y.min()
        assert y[chosen].max() == y.max()
        if len(y) > points:  # between two points nothing sticks out of its bucket, which has few others in it
            size = -(-(len(y) - 2) // ((points - 2) // 2))
            for start in range(1, len(y) - 1, size):
                bucket = range(start, min(start + size, len(y) - 1))
                shown = [y[index] for index in chosen if index in bucket]
                assert min(shown) == y[bucket.start : bucket.stop].min()
                assert max(shown) == y[bucket.start : bucket.stop].max()
    else:
        assert len(chosen) <= points


@given(st.lists(st.integers(0, 50), max_size=40).map(sorted), st.integers(-5, 55), st.integers(-5, 55))
def test_a_range_has_all_its_points_and_one_more_on_either_side(values: list[int], start: int, end: int) -> None:
    x = np.array(values, dtype=float)
    part = x[visible(x, start, max(start, end))].tolist()
    inside = [value for value in values if start <= value <= max(start, end)]
    before, after = [v for v in values if v < start][-1:], [v for v in values if v > max(start, end)][:1]
    assert part == [*before, *inside, *after]


def test_a_curve_is_over_steps_tokens_or_seconds_and_events_are_placed_in_the_same_unit(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows: list[dict[str, Any]] = [
        {
            "step": n,
            "tokens": n * 100,
            "seconds": n / 2,
            "train_loss": 10 - n / 1000,
            **({"val_loss": 5.0} if n % 100 == 0 else {}),
        }
        for n in range(1000)
    ]
    rows[500]["train_loss"] = 99.0
    rows[501]["train_loss"] = float("nan")
    rows.insert(700, {"event": "rollback", "step": 500, "from": 700})
    run.add_metrics(rows)
    file = MetricsFile(run.metrics)
    file.update()
    for unit, scale in (("step", 1), ("tokens", 100), ("seconds", 0.5)):
        view = file.view(unit, 50)
        x, y = view.series["train_loss"]
        assert len(x) <= 50
        assert (x[0], x[-1], view.range) == (0, 999 * scale, (0, 999 * scale))
        assert y[x.index(500 * scale)] == 99, "the spike is there"
        assert view.events == [{"event": "rollback", "step": 500, "from": 700, "x": 500 * scale}]
        assert view.series["val_loss"][0] == [n * 100 * scale for n in range(10)]
        assert view.series.keys() == {"train_loss", "val_loss"}
    zoomed = file.view("tokens", 1500, 20_150, 20_950)
    assert zoomed.series["train_loss"][0] == [n * 100 for n in range(201, 211)]
    assert zoomed.series["val_loss"][0] == [20_000, 30_000], "the line crosses the picture"
    assert zoomed.events == []
    assert zoomed.range == (0, 99_900)


@pytest.mark.parametrize("status", ["running", "finished"])
def test_a_summary_has_the_best_loss_of_all_rows_and_reads_on(tmp_path: Path, status: str) -> None:
    from onym.train.options import TrainOptions

    run = RunFolder(tmp_path)
    about = {"steps": 1000, "parameters": 7} | ({} if status == "running" else {"held_out": 4.5, "best": 2.0, "best_step": 10})
    run.describe(TrainOptions(), status, **about)
    summarizer = RunSummarizer(run)
    rows: list[dict[str, Any]] = [
        {"step": n, "train_loss": 3.0, "seconds": n * 2.0, "tokens_per_second": 5.0} for n in range(261)
    ]
    for row in rows[::10]:
        row["val_loss"] = 2 + abs(row["step"] - 10) / 100
    run.add_metrics(rows)
    found = summarizer.summary()
    assert (found.step, found.steps, found.best, found.best_step, found.held_out) == (260, 1000, 2.0, 10, 4.5)
    assert found.status == ("killed" if status == "running" else "finished"), "nobody holds its lease"
    assert summarizer.summary() == found
    run.add_metrics([{"event": "skipped-step", "step": 261}] * 500)
    assert summarizer.summary().step == 260, "events alone are in the last rows"
    if status == "running":
        run.add_metrics([{"step": 270, "val_loss": 1.5, "seconds": 540}])
        assert (summarizer.summary().best, summarizer.summary().best_step) == (1.5, 270)
        run.keep_metrics(5)
        assert (summarizer.summary().best, summarizer.summary().best_step) == (2.1, 0)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"status": 3, "options": {}}', '{"status": "finished"}', "[" * 100_000]
)
def test_a_damaged_run_json_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    assert RunSummarizer(RunFolder(tmp_path)).summary().status == "run.json is damaged"
