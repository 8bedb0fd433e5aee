"""The clients that people have, as docs/serving.md shows them, against a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from onym.cli.main import main
from tests.serve.serving import Server, wait_for
from tests.tools.test_lm_eval import ROLLING

GUIDE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
WRITTEN_FOR = "http://127.0.0.1:8000"


def blocks(language: str, word: str) -> list[str]:
    """The guide's code in a language with a word in it."""
    found = [block for block in re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL) if word in block]
    assert found, f"docs/serving.md shows no {language} with {word!r}"
    return found


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def client(served: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def first_text(served: Server) -> str:
    answer = served.complete(model="first", prompt="The function", max_tokens=30, seed=1)
    return str(answer["choices"][0]["text"])


def test_curl(served: Server) -> None:
    (command,) = blocks("sh", "curl")
    out = run("bash", "-c", command.replace(WRITTEN_FOR, served.url))
    assert json.loads(out)["choices"][0]["text"] == first_text(served)


def test_the_openai_package(served: Server) -> None:
    asked = {"model": "talker", "messages": [{"role": "user", "content": "the lamp"}], "max_tokens": 30, "seed": 1}
    reply = served.post("/v1/chat/completions", asked).json["choices"][0]["message"]["content"]
    assert reply
    for script in blocks("python", "import OpenAI"):
        out = run(sys.executable, "-c", script.replace(WRITTEN_FOR, served.url))
        assert out == (reply + "\n" if "chat.completions" in script else first_text(served))


def test_llm(served: Server, tmp_path: Path) -> None:
    """It sends ``stream_options`` unasked, and no max_tokens unless it is given."""
    (models,) = blocks("yaml", "model_id")
    (tmp_path / "extra-openai-models.yaml").write_text(models.replace(WRITTEN_FOR, served.url))
    (tmp_path / "keys.json").write_text('{"none": "none"}')
    (command,) = blocks("sh", "llm -m")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    seeded = command.strip() + " -o seed 1 -o temperature 1"
    out = run("bash", "-c", seeded, LLM_USER_PATH=str(tmp_path), PATH=path)
    assert out.strip() == first_text(served).strip()
    run("bash", "-c", "llm -m first 'The function' --no-stream", LLM_USER_PATH=str(tmp_path), PATH=path)


def test_openai_reads_every_part_of_an_answer(client: openai.OpenAI, served: Server) -> None:
    answer = client.completions.create(model="talker", prompt="the lamp", max_tokens=5, logprobs=2, n=2, seed=3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.token_logprobs or ()) == 5
    chunks = list(
        client.completions.create(
            model="talker", prompt="the lamp", max_tokens=5, seed=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer.choices[0].text
    assert chunks[-1].usage is not None
    reply = client.chat.completions.create(
        model="talker", messages=[{"role": "user", "content": "the river"}], max_tokens=5, seed=3, logprobs=True, top_logprobs=2
    )
    assert reply.choices[0].logprobs is not None
    streamed = client.chat.completions.create(
        model="talker", messages=[{"role": "user", "content": "the river"}], max_tokens=5, seed=3, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == reply.choices[0].message.content
    assert {model.id for model in client.models.list()} == {"talker", "first"}
    assert client.models.retrieve("first").owned_by == "onym"


def test_openai_raises_what_it_should(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nothing") as missing:
        client.completions.create(model="nothing", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature must be a number from 0 to 100, not -1") as wrong:
        client.completions.create(model="talker", prompt="x", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="talker", prompt="x", max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="chat template"):
        client.chat.completions.create(model="first", messages=[{"role": "user", "content": "x"}])


def test_openai_tries_again_where_the_queue_is_full(runs_folder: Path, tmp_path: Path) -> None:
    with Server(tmp_path, runs_folder / "talker", "--slots", "1", "--queue", "0") as server:
        busy = server.begin(max_tokens=30_000, slide=True, ignore_eos=True)
        wait_for(lambda: server.metric("onym_requests_running") == 1, "the text that fills the server")
        refused = server.post("/v1/completions", {"prompt": "x"})
        assert (refused.status, refused.error["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.post("/v1/completions", {"prompt": "x", "n": 2}).status == 400, "two can never be written here"
        impatient, patient = (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=retries, timeout=100) for retries in (0, 20)
        )
        with pytest.raises(openai.RateLimitError):
            impatient.completions.create(model="talker", prompt="x")
        rejected = 'onym_requests_total{path="/v1/completions",status="429"}'
        before = server.metric(rejected)
        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(lambda: patient.completions.create(model="talker", prompt="x", max_tokens=4))
            wait_for(lambda: server.metric(rejected) > before, "a retry")
            busy.close()
            assert asking.result().usage


def test_lm_eval_gives_what_onym_evaluate_gives(runs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It asks for tokens without naming a model, so the server has one."""
    texts = [f"the lamp and the {word}, the stone" for word in ("river", "garden", "island", "letter")]
    (tmp_path / "rolling.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "task.yaml").write_text(ROLLING.replace("FOLDER", str(tmp_path)))
    (command,) = blocks("sh", "lm_eval run")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    here = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets"), "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    with Server(tmp_path, runs_folder / "first") as server:
        for old, new in ((WRITTEN_FOR, server.url), ("lambada_openai", "local_rolling"), ("=128", "=64")):
            assert old in command
            command = command.replace(old, new)
        run("bash", "-c", f"{command.strip()} --include_path {tmp_path} --output_path {tmp_path / 'out'}", **here)
    (report,) = (tmp_path / "out").rglob("*.json")
    theirs = json.loads(report.read_text())["results"]["local_rolling"]["bits_per_byte,none"]
    assert main(["evaluate", str(runs_folder / "first"), "--data", str(tmp_path / "rolling.jsonl"), "--json"]) == 0
    (ours,) = json.loads(capsys.readouterr().out)["models"]
    assert theirs == pytest.approx(ours["bits_per_byte"], rel=1e-4)
