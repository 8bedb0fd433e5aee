"""More clients than the server takes: each gets its own text, whole, or is asked to come again; and memory stays flat."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.serving import Server

CLIENTS, SECONDS, REQUESTS = (64, 60.0, 10_000) if os.environ.get("ONYM_PROVE") else (24, 8.0, 600)
MOST_GROWTH = 10 << 20
"""Bytes that the second and third third of the requests may add."""
TEXTS: list[dict[str, Any]] = [
    {"model": "talker", "prompt": f"the {word}", "max_tokens": length, "seed": seed, "return_token_ids": True, "n": n}
    for seed, (word, length, n) in enumerate(
        (word, length, n) for word in ("lamp", "river", "stone") for length, n in ((1, 1), (24, 1), (60, 1), (30, 3))
    )
]


@pytest.fixture(scope="module")
def narrow(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    given = ("--model", f"talker={runs_folder / 'talker'}", "--slots", "4", "--queue", "8")
    with Server(tmp_path_factory.mktemp("narrow"), *given) as server:
        yield server


Texts = dict[int, tuple[str, list[int]]]


def whole(server: Server, body: dict[str, Any]) -> tuple[int, Texts]:
    answer = server.post("/v1/completions", body)
    if answer.status != 200:
        assert answer.error["type"] in ("rate_limit_error", "server_error")
        assert int(answer.headers["retry-after"]) > 0
        return answer.status, {}
    assert answer.json["seed"] == body["seed"]
    choices = answer.json["choices"]
    return 200, {choice["index"]: (choice["text"], choice["token_ids"]) for choice in choices if choice["finish_reason"]}


def streamed(server: Server, body: dict[str, Any]) -> tuple[int, Texts]:
    connection = server.begin(**body)
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    if answer.status != 200:
        return answer.status, {}
    *pieces, end = [line[6:] for line in content.split("\n") if line.startswith("data: ")]
    assert end == "[DONE]"
    texts: Texts = {}
    finished = Counter[int]()
    for choice in (json.loads(piece)["choices"][0] for piece in pieces):
        text, ids = texts.get(choice["index"], ("", []))
        texts[choice["index"]] = text + choice["text"], ids + choice["token_ids"]
        finished[choice["index"]] += choice["finish_reason"] is not None
    assert set(finished.values()) == {1}
    return 200, texts


def test_every_client_gets_its_own_text_or_is_asked_to_come_again(narrow: Server) -> None:
    alone = [whole(narrow, body)[1] for body in TEXTS]
    assert all(len(texts) == body["n"] for texts, body in zip(alone, TEXTS, strict=True))
    statuses, wrong = Counter[int](), list[str]()
    end = time.monotonic() + SECONDS

    def ask(client: int) -> None:
        chance = random.Random(client)
        try:
            while time.monotonic() < end:
                number = chance.randrange(len(TEXTS))
                status, texts = (streamed if chance.random() < 0.5 else whole)(narrow, TEXTS[number])
                statuses[status] += 1
                if status not in (200, 429, 503) or (status == 200 and texts != alone[number]):
                    wrong.append(f"client {client}, request {number}, status {status}: {texts} for {alone[number]}")
        except BaseException as error:
            wrong.append(f"client {client}: {error!r}")

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    print(dict(statuses))
    assert statuses[200] > CLIENTS
    assert statuses[429] > 0  # the load was one
    narrow.wait_until_idle()
    assert [whole(narrow, body)[1] for body in TEXTS] == alone
    assert "Traceback" not in narrow.log


def test_memory_does_not_grow_with_requests(narrow: Server) -> None:
    """Whole, streamed, refused, and left by their clients."""

    def memory() -> int:
        status = Path(f"/proc/{narrow.process.pid}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])

    after_a_third = 0
    for number in range(REQUESTS):
        body = {**TEXTS[number % len(TEXTS)], "max_tokens": 8, "prompt": f"the {number}", "logprobs": 2}
        kind = number % 6
        if kind < 2:
            assert whole(narrow, body)[0] == 200
        elif kind < 4:
            assert streamed(narrow, body)[0] == 200
        elif kind == 4:
            assert narrow.post("/v1/completions", {"model": f"talker@{number}", f"field{number}": 1}).status == 404
        else:
            narrow.begin(**{**body, "max_tokens": 30_000, "slide": True}).close()
        if number % 6 == 5:
            narrow.wait_until_idle()
        if number == REQUESTS // 3:
            after_a_third = memory()
    grown = memory() - after_a_third
    print(f"{after_a_third >> 20} MiB after a third, {grown / 2**20:+.1f} MiB at the end")
    assert grown < MOST_GROWTH
