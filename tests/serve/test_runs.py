"""The Runs page's answers, from a real server: lists, curves, samples, checkpoints, events of a run that trains meanwhile."""

from __future__ import annotations

import asyncio
import csv
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
from starlette.applications import Starlette

from onym.serve import run_events
from onym.serve.errors import ApiError, error_response
from onym.serve.run_folders import ServedRuns
from onym.serve.runs import RunsApi
from onym.train.options import TrainOptions
from onym.train.run_folder import RunFolder
from tests.conftest import TINY_RUN, Run, write_book

PATIENCE = 60.0  # seconds, for what comes in a moment


class Server:
    """A server of runs on a port of its own, and a client of it."""

    def __init__(self, api: RunsApi) -> None:
        self.api = api
        app = Starlette(routes=api.routes, exception_handlers={ApiError: lambda request, error: error_response(error)})
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        until(lambda: self._server.started)

    def _serve(self) -> None:
        self.loop.run_until_complete(self._server.serve([self._socket]))

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.api.close(), self.loop).result(PATIENCE)
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "no stream keeps the server from ending"

    def ask(self, path: str, method: str = "GET", body: str | None = None, **headers: str) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content, answer.headers

    def json(self, path: str, status: int = 200, method: str = "GET", **how: Any) -> Any:
        got, content, headers = self.ask(path, method, **how)
        assert got == status, (got, content)
        assert headers["content-type"] == "application/json"
        answer = json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        if status >= 400:
            assert answer["error"].keys() == {"message", "type", "param", "code"}
            assert answer["error"]["message"].endswith(".")
        return answer

    @contextmanager
    def events(self, query: str = "") -> Iterator[Callable[..., dict[str, Any]]]:
        """A function that returns the next event of a kind that fits."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", f"/api/events{query}")
        answer = connection.getresponse()
        assert answer.headers["content-type"].startswith("text/event-stream")

        def following(kind: str, fits: Callable[[dict[str, Any]], bool] = lambda data: True) -> dict[str, Any]:
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                event = answer.readline().decode()
                assert event, "the stream ended"
                if not event.startswith("event: "):
                    continue
                data: dict[str, Any] = json.loads(answer.readline().decode().removeprefix("data: "))
                if event.strip() == f"event: {kind}" and fits(data):
                    return data
            raise AssertionError(f"no {kind} came")

        following("ready")
        try:
            yield following
        finally:
            connection.sock.shutdown(socket.SHUT_RDWR) if connection.sock else None
            answer.close()
            connection.close()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for number, name in enumerate(("first", "second")):
        make(folder / name)
        os.utime(folder / name / "run.json", (number, number))
        os.utime(folder / name / "metrics.jsonl", (number, number))
    return folder


def make(path: Path, rows: int = 30, **about: Any) -> RunFolder:
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.add_metrics({"step": n, "tokens": n * 10, "seconds": n / 4, "train_loss": 9 - n / 10, "lr": 0.1} for n in range(rows))
    run.describe(TrainOptions(), "finished", **{"steps": 30, "best": 1.5, "held_out": 2.5, "best_step": 9, **about})
    run.add_sample(0, "before </script> the first step")
    run.add_sample(20, "later")
    return run


@pytest.fixture
def server(runs: Path) -> Iterator[Server]:
    served = Server(RunsApi(runs))
    yield served
    served.close()


def test_all_runs_are_listed_the_newest_first(server: Server, runs: Path) -> None:
    answer = server.json("/api/runs")
    assert answer["folder"] == str(runs)
    assert [run["name"] for run in answer["runs"]] == ["second", "first"]
    first = answer["runs"][1]
    assert (first["status"], first["step"], first["best"], first["best_step"], first["held_out"]) == (
        "finished",
        29,
        1.5,
        9,
        2.5,
    )
    assert first["eta_seconds"] is None
    (runs / "first/run.json").write_text("{")
    assert [run["status"] for run in server.json("/api/runs")["runs"]] == ["run.json is damaged", "finished"]
    shutil.rmtree(runs)
    assert server.json("/api/runs")["runs"] == []


def test_one_run_alone_is_served_without_its_neighbours(runs: Path) -> None:
    server = Server(RunsApi(run=runs / "first"))
    try:
        assert [run["name"] for run in server.json("/api/runs")["runs"]] == ["first"]
        assert server.json("/api/runs/first/metrics")["rows"] == 30
        assert server.json("/api/runs/second/metrics", 404)
    finally:
        server.close()


def test_without_runs_every_answer_says_how_to_have_them() -> None:
    server = Server(RunsApi())
    try:
        for path in ("/api/runs", "/api/runs/first/metrics", "/api/events"):
            assert "onym serve runs/" in server.json(path, 404)["error"]["message"]
    finally:
        server.close()


def test_curves_are_over_any_unit_zoomed_and_downsampled(server: Server) -> None:
    whole = server.json("/api/runs/first/metrics")
    assert whole["series"]["train_loss"]["x"] == list(range(30))
    assert (whole["x"], whole["range"], whole["events"]) == ("step", [0, 29], [])
    few = server.json("/api/runs/first/metrics?points=5&x=seconds")
    assert len(few["series"]["lr"]["x"]) <= 5
    assert few["range"] == [0, 7.25]
    assert server.json("/api/runs/first/metrics?from=10&to=12&x=tokens")["series"]["train_loss"]["x"] == [0, 10, 20]


@pytest.mark.parametrize(
    "query",
    ["x=epoch", "points=1", "points=0", "points=1e3", "points=99999", "from=nan", "to=inf", "from=x", f"points={'9' * 5000}"],
)
def test_a_wrong_query_is_named(server: Server, query: str) -> None:
    error = server.json(f"/api/runs/first/metrics?{query}", 400)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", query.partition("=")[0])


def test_nothing_in_metrics_makes_the_server_fail(server: Server, runs: Path) -> None:
    with (runs / "first/metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": "x", "train_loss": []}\n{"step": 30, "train_loss": NaN, "lr": Infinity}\n')
        file.write('{"event": "skipped-step", "step": 30, "loss": NaN, "reason": "\\ud800"}\nnonsense\n{"step": 99}\n')
    answer = server.json("/api/runs/first/metrics")
    assert answer["series"]["train_loss"]["x"][-1] == 29
    assert answer["events"] == [{"event": "skipped-step", "step": 30, "loss": None, "reason": "\ud800", "x": 30}]
    assert server.json("/api/runs")


def test_a_table_has_every_row(server: Server, runs: Path) -> None:
    RunFolder(runs / "first").add_metrics([{"event": "rollback", "step": 3, "reason": "=1+1", "batches": [1, 2]}])
    status, content, headers = server.ask("/api/runs/first/metrics.csv")
    assert status == 200
    assert headers["content-disposition"] == "attachment; filename*=UTF-8''first.csv"
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    assert len(rows) == 31
    assert rows[3]["train_loss"] == "8.7"
    assert (rows[30]["event"], rows[30]["reason"], rows[30]["batches"]) == ("rollback", "'=1+1", "[1, 2]")


def test_samples_are_listed_and_read(server: Server) -> None:
    assert server.json("/api/runs/first/samples") == {"samples": [{"step": 0}, {"step": 20}]}
    assert server.json("/api/runs/first/samples/0") == {"step": 0, "text": "before </script> the first step"}
    for step in ("7", "-1", "9" * 5000, "0x0", "000000000", ".."):
        server.json(f"/api/runs/first/samples/{quote(step, '')}", 404)


def test_options_are_those_of_run_json(server: Server) -> None:
    answer = server.json("/api/runs/first/options")
    assert answer["options"] == TrainOptions().to_dict()
    assert answer["facts"]["best_step"] == 9


@pytest.mark.parametrize("name", ["a b", "größe-日本", "<script>", "a,b", "%2e%2e", "a?b#c", "'\"&", "..."])
def test_a_run_may_have_any_name_that_a_folder_has(server: Server, runs: Path, name: str) -> None:
    make(runs / name)
    assert name in [run["name"] for run in server.json("/api/runs")["runs"]]
    assert server.json(f"/api/runs/{quote(name, '')}/metrics")["run"] == name
    assert server.ask(f"/api/runs/{quote(name, '')}/metrics.csv")[0] == 200
    with server.events(f"?metrics={quote(name, '')}") as following:
        assert following("metrics")["run"] == name


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "%2e%2e",
        "%2E%2E%2F",
        "..%2Fsecret",
        "%2Fetc",
        "first%00",
        "%00",
        "first%2F..%2Fsecond",
        "%ff",
        "x" * 5000,
        "",
    ],
)
def test_a_name_that_is_no_run_reaches_nothing(server: Server, runs: Path, name: str) -> None:
    make(runs.parent / "secret")
    (runs / "no run").mkdir()
    for what in ("metrics", "metrics.csv", "samples", "samples/0", "checkpoints", "options"):
        status, content, _ = server.ask(f"/api/runs/{name}/{what}")
        assert status == 404, (status, content)
        assert b"train_loss" not in content
    assert server.ask("/api/runs/no%20run/samples")[0] == 404


@pytest.mark.parametrize("name", ["../secret", "first/../../secret", "..", "", "\0", "first/", "./first", "\udcff", "x" * 5000])
def test_a_name_is_looked_up_and_never_a_path(runs: Path, name: str) -> None:
    """Below the routes, which take no name with a slash."""
    make(runs.parent / "secret")
    for refused in (name, str(runs / "first")):
        with pytest.raises(ApiError) as raised:
            ServedRuns(runs, alone=False).find(refused)
        assert raised.value.status == 404


@pytest.mark.parametrize("part", ["", "run.json", "metrics.jsonl", "samples", "checkpoints"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(server: Server, runs: Path, part: str) -> None:
    outside = make(runs.parent / "outside").path
    (outside / "checkpoints").mkdir()
    if part:
        make(runs / "linked")
        target = runs / "linked" / part
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        target.symlink_to(outside / part)
    else:
        (runs / "linked").symlink_to(outside)
    (runs / "inside").symlink_to(runs / "first")
    for what in ("metrics", "metrics.csv", "samples", "samples/0", "checkpoints", "options"):
        assert server.ask(f"/api/runs/linked/{what}")[0] == 403
    statuses = {run["name"]: run["status"] for run in server.json("/api/runs")["runs"]}
    assert "leads out of the folder" in statuses["linked"]
    assert statuses["inside"] == "finished"
    assert server.json("/api/runs/inside/samples/0")


def test_a_sample_that_is_a_link_out_of_the_folder_is_none(server: Server, runs: Path) -> None:
    (runs.parent / "secret.txt").write_text("secret")
    (runs / "first/samples/step-000000033.txt").symlink_to(runs.parent / "secret.txt")
    assert {"step": 33} not in server.json("/api/runs/first/samples")["samples"]
    server.json("/api/runs/first/samples/33", 404)


def test_runs_that_come_change_and_go_are_reported(server: Server, runs: Path) -> None:
    with server.events("?metrics=third&metrics=first") as following, server.events() as other:
        assert following("metrics")["run"] == "first"
        third = make(runs / "third", 3)
        assert following("run", lambda run: run["name"] == "third")["step"] == 2
        assert other("run", lambda run: run["name"] == "third")["step"] == 2
        version = following("metrics")["version"]
        assert version == server.json("/api/runs/third/metrics")["version"]
        third.add_metrics([{"step": 3, "seconds": 2}])
        grown = following("metrics", lambda data: data["version"] != version)
        assert grown == {"run": "third", "version": server.json("/api/runs/third/metrics")["version"], "reset": False}
        third.keep_metrics(1)
        assert following("metrics", lambda data: data["reset"])["run"] == "third"
        assert server.json("/api/runs/third/metrics")["rows"] == 1
        shutil.rmtree(runs / "third")
        assert other("gone") == {"name": "third"}
    until(lambda: not server.api.events.is_watching)


def test_streams_end_with_the_server_and_have_a_limit(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_events, "_MOST_LISTENERS", 2)
    server = Server(RunsApi(runs))
    with server.events(), server.events():
        status, _, headers = server.ask("/api/events")
        assert (status, headers["retry-after"]) == (503, "30")
        server.close()


def test_after_the_end_every_answer_says_so(server: Server) -> None:
    asyncio.run_coroutine_threadsafe(server.api.close(), server.loop).result(PATIENCE)
    for path in ("/api/runs", "/api/runs/first/metrics", "/api/runs/first/metrics.csv", "/api/events"):
        assert "shutting down" in server.json(path, 503)["error"]["message"]


def test_one_that_takes_nothing_is_dropped(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_events, "_PATIENCE", 0.5)
    monkeypatch.setattr(run_events, "_EVERY", 0.02)
    server = Server(RunsApi(runs))
    with socket.create_connection(("127.0.0.1", server.port)) as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.sendall(b"GET /api/events HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: server.api.events.is_watching)
        deadline, number = time.monotonic() + PATIENCE, 0
        while server.api.events.is_watching:  # 500 runs with long names change until no buffer takes more
            number += 1
            for each in range(100):
                path = runs / f"{each:03d}-{'n' * 200}"
                path.mkdir(exist_ok=True)
                (path / "run.json").write_text(json.dumps({"status": f"state {number}", "options": {}}))
            assert time.monotonic() < deadline
    assert server.json("/api/runs")
    server.close()


def test_a_server_answers_while_it_reads_a_long_run(server: Server, runs: Path) -> None:
    make(runs / "long", 300_000)
    reading = threading.Thread(target=server.json, args=("/api/runs/long/metrics",))
    reading.start()
    answers = 0
    while reading.is_alive():
        server.json("/api/runs/first/samples")
        answers += 1
    assert answers > 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a real onym train, with checkpoints of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("trained")
    done = train(folder, "--steps", 20, "--save-every", 10)
    assert done.wait(300) == 0
    return folder / "runs"


def train(folder: Path, *options: object) -> subprocess.Popen[bytes]:
    book = folder / "book.txt"
    if not book.exists():
        write_book(folder)
    command = [sys.executable, "-m", "onym", "train", "--data", str(book), *TINY_RUN, "--compile", "off", "--name", "live"]
    environment = {**os.environ, "ONYM_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*command, *map(str, options)], cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def test_checkpoints_are_listed_verified_and_found_damaged(trained: Path, tmp_path: Path, onym: Run) -> None:
    runs = shutil.copytree(trained, tmp_path / "runs")
    directory = runs / "live/checkpoints"
    (directory / "keep.pin").write_text("10\n")
    server = Server(RunsApi(runs))
    try:
        newest, older = server.json("/api/runs/live/checkpoints")["checkpoints"]
        said = json.loads(onym("inspect", runs / "live", "--json").stdout)["steps"]
        for row, expected in zip((older, newest), said, strict=True):
            assert (row["step"], row["identity"], row["bytes"], row["saved"], row["pinned"]) == tuple(
                expected[name] for name in ("step", "identity", "bytes", "time", "pinned")
            )
        assert older["pinned"] == ["keep"]
        assert newest["val_loss"] > 0
        assert (newest["verified"], newest["damaged"]) == (None, None)

        def verify(step: object, status: int = 200, kind: str = "application/json") -> Any:
            return server.json(f"/api/runs/live/checkpoints/{step}/verify", status, "POST", body="{}", content_type=kind)

        assert verify(20) == {"step": 20, "verified": True}
        assert [row["verified"] for row in server.json("/api/runs/live/checkpoints")["checkpoints"]] == [True, None]
        weights = directory / "step-000000010/model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
        answer = verify(10)
        assert answer["verified"] is False
        assert "is damaged" in answer["reason"]
        assert [row["verified"] for row in server.json("/api/runs/live/checkpoints")["checkpoints"]] == [True, False]
        content[-5] ^= 1
        weights.write_bytes(content)
        assert server.json("/api/runs/live/checkpoints")["checkpoints"][1]["verified"] is None, "its files are others now"
        (directory / "step-000000010/manifest.json").write_text("{}")
        assert "damaged" in server.json("/api/runs/live/checkpoints")["checkpoints"][1]["damaged"]
        for step in (11, "020", "..", "9" * 5000):
            verify(step, 404)
        verify(20, 415, "text/plain")
        assert server.ask("/api/runs/live/checkpoints/20/verify")[0] == 405
    finally:
        server.close()


def test_a_run_is_watched_from_its_beginning_to_its_end_and_through_a_resume(tmp_path: Path) -> None:
    """Interrupted after its last checkpoint, the run that continues writes rows anew: what was drawn is reported as void."""
    server = Server(RunsApi(tmp_path / "runs"))
    try:
        with server.events("?metrics=live") as following:
            options = ("--steps", 100_000, "--save-every", 10, "--schedule", "constant")
            process = train(tmp_path, *options)
            running = following("run", lambda run: run["name"] == "live" and run["eta_seconds"] is not None)
            assert running["status"] == "running"
            seen = following("metrics")
            following("metrics", lambda data: data["version"] != seen["version"])
            process.kill()  # its newest rows are later than its newest checkpoint, or its last line is cut
            process.wait()
            assert following("run", lambda run: run["status"] == "killed")["eta_seconds"] is None
            rows = server.json("/api/runs/live/metrics")["rows"]
            process = train(tmp_path, *options)
            assert following("metrics", lambda data: data["reset"])["run"] == "live"
            following("run", lambda run: run["status"] == "running" and run["eta_seconds"] is not None)
            process.send_signal(signal.SIGINT)
            process.wait()
            assert following("run", lambda run: run["status"] == "interrupted")["best"] > 0
            steps = server.json("/api/runs/live/metrics?points=10000")["series"]["train_loss"]["x"]
            assert steps == sorted(set(steps)), "no zigzag"
            assert len(steps) > 1
            assert rows > 1
            last = server.json("/api/runs")["runs"][0]
            assert last["step"] == steps[-1]
            done = train(tmp_path, "--steps", last["step"] + 10, "--save-every", 10, "--schedule", "constant")
            finished = following("run", lambda run: run["status"] == "finished")
            assert finished["step"] == last["step"] + 10
            assert done.wait(PATIENCE) == 0
        one = json.loads((tmp_path / "runs/live/run.json").read_text())
        listed = server.json("/api/runs")["runs"][0]
        assert listed["best"] == round(one["best"], 6)
    finally:
        server.close()


def test_a_run_that_vanishes_is_not_found(server: Server, runs: Path) -> None:
    stop, statuses = threading.Event(), set()

    def ask() -> None:
        while not stop.is_set():
            for what in ("metrics", "metrics.csv", "samples", "samples/0", "checkpoints", "options"):
                statuses.add(server.ask(f"/api/runs/passing/{what}")[0])
            statuses.add(server.ask("/api/runs")[0])

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for each in asking:
        each.start()
    for _ in range(100):
        make(runs / "passing")
        shutil.rmtree(runs / "passing")
    stop.set()
    for each in asking:
        each.join()
    assert statuses == {200, 404}
