"""What goes wrong around the server: clients that leave, stall or speak nonsense, signals, files that vanish, newer steps."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import onym as onym_library
from tests.chat_model import TOKENIZER
from tests.conftest import Run
from tests.serve.serving import DEADLINE, Server, wait_for

# Time limits of seconds rather than half minutes, and small buffers, so that a client that reads nothing is noticed soon.
HASTY = """
import socket
from onym.serve import answers, guard, server
guard.BODY_SECONDS = server.HEADER_SECONDS = answers.SLOW_SECONDS = server.SLOW_SECONDS = 1.0
server._CLOSING_SECONDS = 0.5
bind = server.bind
def bind_with_small_buffers(host, port):
    bound = bind(host, port)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    return bound
server.bind = bind_with_small_buffers
"""
TEXT: dict[str, Any] = {"model": "talker", "prompt": "the lamp", "max_tokens": 40, "seed": 3}
LONG: dict[str, Any] = {"model": "talker", "prompt": "the river", "slide": True, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def hasty(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    given = ("--model", f"talker={runs_folder / 'talker'}", "--slots", "4", "--queue", "8")
    with Server(tmp_path_factory.mktemp("hasty"), *given, before=HASTY) as server:
        yield server


def text_of(server: Server, **body: Any) -> str:
    (choice,) = server.complete(**body)["choices"]
    return str(choice["text"])


def events(answer: http.client.HTTPResponse) -> list[str]:
    """What is left of a stream."""
    return [line[6:] for line in answer.read().decode().split("\n") if line.startswith("data: ")]


def begin(server: Server, **body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse, str]:
    """A stream whose first event has come."""
    connection = server.begin(**body)
    answer = connection.getresponse()
    assert answer.status == 200
    return connection, answer, answer.readline().decode().removeprefix("data: ")


def holds_connection(server: Server, client: socket.socket) -> bool:
    """Whether the server's end is open, as Linux shows it."""
    ports = f":{server.address[1]:04X}", f":{client.getsockname()[1]:04X}"
    rows = (line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(ours.endswith(ports[0]) and theirs.endswith(ports[1]) and state == "01" for ours, theirs, state in rows)


def written(pieces: list[str]) -> str:
    return "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces if piece != "[DONE]")


# -- clients


def test_clients_that_leave_at_any_moment_leave_nothing_behind(hasty: Server) -> None:
    """Running and queued, streamed and whole, before and after the first token."""
    expected, chance = text_of(hasty, **TEXT), random.Random(7)
    under_way: list[http.client.HTTPConnection] = []
    for number in range(80):
        if len(under_way) == 12:  # the slots and the queue are full
            under_way.pop(chance.randrange(12)).close()
        streamed = chance.random() < 0.6
        under_way.append(hasty.begin(**{**LONG, "stream": streamed, "max_tokens": chance.choice((3, 30, 30_000))}))
        if streamed and len(under_way) <= 4 and number < 40:
            answer = under_way[-1].getresponse()
            for _ in range(chance.randrange(4)):
                answer.readline()
    while under_way:
        under_way.pop(chance.randrange(len(under_way))).close()
    hasty.wait_until_idle()
    assert text_of(hasty, **TEXT) == expected
    assert hasty.metric("onym_requests_cancelled_total") > 0
    assert "Traceback" not in hasty.log


def test_a_request_that_does_not_arrive_is_given_up(hasty: Server) -> None:
    """Headers: the connection is closed. A body: 408, with a sentence."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    with socket.create_connection(hasty.address, timeout=DEADLINE) as connection:
        assert connection.recv(100) == b""  # nothing at all was sent
    with socket.create_connection(hasty.address, timeout=DEADLINE) as connection:
        connection.sendall(head)
        assert connection.recv(100) == b""
    with socket.create_connection(hasty.address, timeout=DEADLINE) as connection:
        connection.sendall(head + b'\r\n{"prompt": "xylo')
        answer = b""
        while b"The body did not arrive within 1 seconds." not in answer:
            part = connection.recv(65536)
            assert part, answer
            answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(hasty.address, timeout=DEADLINE) as connection:
        connection.sendall(head + b'\r\n{"prompt": "xylo')  # and leaves
    wait_for(lambda: hasty.get("/health").status == 200, "the next answer")
    assert "xylo" not in hasty.log
    assert "Traceback" not in hasty.log


def test_nonsense_after_a_good_beginning_ends_the_connection(hasty: Server) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
    for kind in (b"text/plain", b"application/json"):
        with socket.create_connection(hasty.address, timeout=DEADLINE) as connection:
            connection.sendall(head % kind + b"5\r\n")
            if kind == b"text/plain":
                assert connection.recv(65536).startswith(b"HTTP/1.1 415 ")
            connection.sendall(b"{not a chunk's length}\r\n" * 3)
            while connection.recv(65536):
                pass
    assert hasty.get("/health").status == 200
    assert "Traceback" not in hasty.log


def test_a_client_that_does_not_read_is_dropped(hasty: Server) -> None:
    """The text ends, and its connection too, with all that waited to be sent."""
    dropped = hasty.metric("onym_requests_dropped_total")
    body = json.dumps({**LONG, "stream": True, "n": 4, "max_tokens": 30_000, "logprobs": 5, "return_token_ids": True}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(hasty.address)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        assert holds_connection(hasty, connection)
        wait_for(lambda: hasty.metric("onym_requests_dropped_total") == dropped + 1, "the drop")
        hasty.wait_until_idle()
        wait_for(lambda: not holds_connection(hasty, connection), "the end of the connection")
    assert "Traceback" not in hasty.log


# -- signals


def test_after_sigterm_texts_under_way_end_whole_and_no_new_ones_begin(runs_folder: Path, tmp_path: Path) -> None:
    with Server(tmp_path, "--model", f"talker={runs_folder / 'talker'}", "--grace", "10m") as server:
        body = {**LONG, "max_tokens": 3000}
        connection, answer, first = begin(server, **body)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.get("/ready").status == 503, "the end's beginning")
        refused = server.post("/v1/completions", TEXT)
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) > 0
        assert server.get("/health").status == 200
        pieces = [first, *events(answer)]
        connection.close()
        assert pieces[-1] == "[DONE]"
        assert json.loads(pieces[-2])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(DEADLINE) == 143
        assert "Traceback" not in server.log


@pytest.mark.parametrize(("grace", "signals", "code"), [("1s", [signal.SIGTERM], 143), ("10m", [signal.SIGINT] * 2, 130)])
def test_a_text_that_may_not_end_says_so(
    runs_folder: Path, tmp_path: Path, grace: str, signals: list[signal.Signals], code: int
) -> None:
    """After the grace, or at a second signal at once: an error in the stream, and no [DONE]."""
    with Server(tmp_path, "--model", f"talker={runs_folder / 'talker'}", "--grace", grace, "--slots", "1") as server:
        connection, answer, first = begin(server, **LONG, max_tokens=32_000)
        queued = server.begin(**LONG, max_tokens=32_000)
        wait_for(lambda: server.metric("onym_requests_waiting") == 1, "the queue")
        for number in signals[:-1]:
            server.process.send_signal(number)
            wait_for(lambda: server.get("/ready").status == 503, "the end's beginning")
            assert server.metric("onym_requests_running") == 1
        server.process.send_signal(signals[-1])
        pieces = [first, *events(answer)]
        assert json.loads(pieces[-1])["error"]["code"] == "shutting_down"
        assert "[DONE]" not in pieces
        of_queued = queued.getresponse()
        assert of_queued.status == 503
        assert of_queued.headers["retry-after"]
        assert json.loads(of_queued.read())["error"]["code"] == "shutting_down"
        connection.close()
        queued.close()
        assert server.process.wait(DEADLINE) == code
        assert "Traceback" not in server.log


# -- files


def test_a_model_whose_files_are_deleted_goes_on_from_memory(runs_folder: Path, tmp_path: Path) -> None:
    """And what is not in memory is a sentence."""
    shutil.copytree(runs_folder, tmp_path / "runs")
    run = tmp_path / "runs" / "first"
    with Server(tmp_path, "--model", f"first={run}", tmp_path / "runs", "--follow") as server:
        body = {"model": "first", "prompt": "the lamp was", "max_tokens": 30, "seed": 1}
        expected = text_of(server, **body)
        (run / "checkpoints" / "step-000000010" / "model.safetensors").unlink()
        answer = server.post("/v1/completions", {**body, "model": "first@10"})
        assert answer.status in (404, 500)
        assert "first@10" in answer.error["message"]
        for path in (run / "checkpoints", run):
            shutil.rmtree(path)
            assert text_of(server, **body) == expected
            assert server.post("/v1/completions", {**body, "model": "first@20"}).error["code"] == "model_not_found"
            assert server.get("/v1/models").status == server.get("/api/runs").status == 200
        assert "Traceback" not in server.log


def test_runs_that_come_and_go_do_not_disturb_those_who_look(runs_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_folder, tmp_path / "runs")
    come, gone = tmp_path / "runs" / "guest", tmp_path / "guest"
    (come / "samples").mkdir(parents=True)
    shutil.copytree(runs_folder / "first", come, dirs_exist_ok=True)
    with Server(tmp_path, "--model", f"talker={tmp_path / 'runs' / 'talker'}", tmp_path / "runs", "--follow") as server:
        done = threading.Event()

        def disturb() -> None:
            while not done.is_set():
                come.rename(gone)
                gone.rename(come)
                (come / "checkpoints").rename(gone)
                gone.rename(come / "checkpoints")

        disturbing = threading.Thread(target=disturb)
        disturbing.start()
        try:
            for _ in range(150):
                for path in ("/v1/models", "/api/runs"):
                    answer = server.get(path)
                    assert answer.status == 200, answer.body
                for path in ("metrics", "checkpoints", "options", "samples"):
                    answer = server.get(f"/api/runs/guest/{path}")
                    assert answer.status in (200, 404), answer.body
            for step in (10, 20, 30):
                answer = server.post("/v1/completions", {"model": f"guest@{step}", "prompt": "the", "max_tokens": 1})
                assert answer.status in (200, 404, 500), answer.body
                assert answer.status == 200 or answer.error
        finally:
            done.set()
            disturbing.join()
        assert text_of(server, **TEXT)


def test_a_newer_step_is_served_and_a_text_that_began_ends_on_its_own(runs_folder: Path, tmp_path: Path) -> None:
    """The step is committed as training does it: by a rename."""
    shutil.copytree(runs_folder / "first", tmp_path / "runs" / "first")
    steps = tmp_path / "runs" / "first" / "checkpoints"
    (steps / "step-000000030").rename(tmp_path / "newer")
    with Server(tmp_path, tmp_path / "runs" / "first", "--follow") as server:
        body = {**LONG, "model": "first", "max_tokens": 5000}
        connection, answer, first = begin(server, **body)
        (tmp_path / "newer").rename(steps / "step-000000030")
        wait_for(lambda: server.get("/v1/models/first").json["step"] == 30, "the newer step")
        assert server.metric("onym_requests_running") == 1
        pieces = [first, *events(answer)]
        connection.close()
        assert pieces[-1] == "[DONE]"
        assert written(pieces) == text_of(server, **{**body, "model": "first@20"})
        short = {**body, "max_tokens": 60}
        assert text_of(server, **short) == text_of(server, **{**short, "model": "first@30"}) != written(pieces)[:60]
        assert "'first' is now step 30." in server.log


def test_a_newer_step_that_is_damaged_is_tried_once_and_the_next_one_is_served(runs_folder: Path, tmp_path: Path) -> None:
    """That another run's steps are served meanwhile shows that it was looked at again."""
    names = ("step-000000020", "step-000000030")
    for run in ("first", "other"):
        shutil.copytree(runs_folder / "first", tmp_path / "runs" / run)
        (tmp_path / run).mkdir()
        for name in names:
            (tmp_path / "runs" / run / "checkpoints" / name).rename(tmp_path / run / name)
    weights = tmp_path / "first" / names[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    def add(run: str, step: int) -> None:
        name = f"step-{step:09d}"
        (tmp_path / run / name).rename(tmp_path / "runs" / run / "checkpoints" / name)

    with Server(tmp_path, tmp_path / "runs" / "first", tmp_path / "runs" / "other", "--follow") as server:
        add("first", 20)
        wait_for(lambda: "Passed over" in server.log, "the damaged step")
        for step in (20, 30):
            add("other", step)
            wait_for(lambda step=step: server.get("/v1/models/other").json["step"] == step, "the other run")  # type: ignore[misc]
        assert server.log.count("Passed over") == 1
        assert "'first' is now" not in server.log
        add("first", 30)
        wait_for(lambda: server.get("/v1/models/first").json["step"] == 30, "the good step")


def test_a_run_without_a_checkpoint_is_asked_for_later(runs_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_folder / "first", tmp_path / "runs" / "first")
    (tmp_path / "runs" / "first" / "checkpoints").rename(tmp_path / "later")
    with Server(tmp_path, tmp_path / "runs" / "first", "--follow") as server:
        answer = server.post("/v1/completions", {"prompt": "the"})
        assert (answer.status, "retry-after" in answer.headers) == (503, True)
        (tmp_path / "later").rename(tmp_path / "runs" / "first" / "checkpoints")
        wait_for(lambda: server.post("/v1/completions", {"prompt": "the", "max_tokens": 1}).status == 200, "the first step")


# -- what cannot be served


def test_a_server_that_cannot_begin_says_why(onym: Run, runs_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(os.urandom(100))
    shutil.copytree(runs_folder / "talker", tmp_path / "cut")
    weights = next((tmp_path / "cut").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = onym("serve", runs_folder / "talker", "--port", port)
        assert (done.returncode, str(port) in done.stderr, "--port" in done.stderr) == (2, True, True)
    config = onym_library.GPTConfig(
        vocab_size=320, context_length=24, emb_dim=32, n_heads=2, n_layers=1, labels=("bad", "good")
    )
    onym_library.save(onym_library.GPT(config), tmp_path / "classifier")
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json())
    done = onym("serve", "classifier", "--tokenizer", "tokenizer.json", "--port", 0)
    assert (done.returncode, "tells labels apart (bad, good)" in done.stderr) == (2, True), done.stderr
    for model in ("broken.safetensors", "cut", "empty", "nothing-there", "first@10"):
        done = onym("serve", model, "--port", 0)
        assert done.returncode == 2, (model, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].endswith((".", ")"))


def test_a_gpu_that_failed_ends_the_server(runs_folder: Path, tmp_path: Path) -> None:
    """After an illegal address every later call of CUDA fails too, so a supervisor has to start another process."""
    failing = """
import torch
from onym.generation.engine import Engine
def step(self):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
Engine.step = step
"""
    with Server(tmp_path, runs_folder / "talker", "--follow", before=failing) as server:
        answer = server.post("/v1/completions", TEXT)
        assert answer.status == 500
        assert "The model failed" in answer.error["message"]
        assert server.process.wait(DEADLINE) == 2
        assert "The GPU failed, and this process cannot use it any more: start the server again." in server.log


def test_a_model_that_does_not_fit_beside_the_others_is_for_later(runs_folder: Path, tmp_path: Path) -> None:
    short = """
import torch
from onym.serve import models
def engine(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
class First(models.Engine):
    made = False
    def __new__(cls, *arguments, **options):
        if First.made:
            engine()
        First.made = True
        return super().__new__(cls)
models.Engine = First
"""
    with Server(tmp_path, "--model", f"talker={runs_folder / 'talker'}", runs_folder, before=short) as server:
        answer = server.post("/v1/completions", {**TEXT, "model": "first"})
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert "no memory for 'first'" in answer.error["message"]
        assert server.post("/v1/completions", TEXT).status == 200
