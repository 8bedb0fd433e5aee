"""A server for the tests: ``onym serve`` in a process of its own, and what is asked of it without any client's help."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

DEADLINE = 120.0
"""Seconds after which something that is waited for has failed: much more than it takes."""


class Answered(NamedTuple):
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What is wrong, as clients read it."""
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert found["message"].endswith((".", ")."))
        return dict(found)


class Server:
    """The process. Ends with SIGTERM at the end of the block.

    Args:
        before: a program that runs in the process first, to shorten its time limits.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        environment: dict[str, str] | None = None,
        ready: bool = True,
        before: str | None = None,
        compile: str = "off",
    ) -> None:
        self.log_path = folder / "serve.log"
        self._log = self.log_path.open("w")
        program = ["-m", "onym"] if before is None else ["-c", f"{before}\nfrom onym.cli.main import program\nprogram()"]
        command = [sys.executable, *program, "serve", *map(str, arguments), "--port", "0"]
        command += ["--compile", compile, "--dtype", "fp32"]
        own = {"OMP_NUM_THREADS": "1", "ONYM_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1", **(environment or {})}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own},
        )
        self.url = ""
        wait_for(self._find_address, "the address")
        if ready:
            wait_for(lambda: self.get("/ready").status == 200, "a ready server")

    def _find_address(self) -> bool:
        assert self.process.poll() is None, self.log
        line = next((line for line in self.log.splitlines() if line.startswith("For clients") and line.endswith("/v1")), "")
        self.url = line.split()[-1].removesuffix("/v1") if line else ""
        return bool(self.url)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = DEADLINE,
    ) -> Answered:
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Answered(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answered:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answered:
        return self.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})

    def complete(self, **body: Any) -> Any:
        """What a good request to /v1/completions gives."""
        answer = self.post("/v1/completions", body)
        assert answer.status == 200, answer.body
        return answer.json

    def stream(self, path: str = "/v1/completions", **body: Any) -> Iterator[dict[str, Any]]:
        """The chunks of a stream, which has to end as one does."""
        connection = self.begin(path, **body)
        answer = connection.getresponse()
        try:
            assert answer.status == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            while line := answer.readline():
                if line.startswith(b"data: "):
                    if line == b"data: [DONE]\n":
                        assert answer.read() == b"\n"
                        return
                    yield json.loads(line[6:])
            raise AssertionError("the stream ended without [DONE]")
        finally:
            connection.close()

    def begin(self, path: str = "/v1/completions", **body: Any) -> http.client.HTTPConnection:
        """Send a request for a stream, and read nothing."""
        connection = http.client.HTTPConnection(*self.address, timeout=DEADLINE)
        content = json.dumps({"stream": True, **body}).encode()
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        return connection

    def metric(self, name: str) -> float:
        """A figure of /metrics."""
        text = self.get("/metrics").body.decode()
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])

    def wait_until_idle(self) -> None:
        """Until nothing is written and nothing waits."""
        wait_for(
            lambda: self.metric("onym_requests_running") == 0 and self.metric("onym_requests_waiting") == 0, "an idle server"
        )

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()


def wait_for(happened: Callable[[], bool], what: str) -> None:
    """Ask again and again."""
    end = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < end, f"waited {DEADLINE:.0f} seconds for {what}"
        time.sleep(0.02)
