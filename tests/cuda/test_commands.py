"""The commands on a GPU: text, a server, the ladder, the doctor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from onym import GPTConfig
from onym.data.chat_template import CHATML
from onym.tools.doctor.machine import find_gpus, matmul_rates
from onym.tools.ladder import ladder
from onym.tools.ladder.ladder import RUNGS, climb
from onym.tools.ladder.process import Setting, build
from onym.train.display import Display
from onym.train.metering import documented_peak, memory_in_use, peak_of
from onym.train.precision import choose_compute
from tests import chat_model
from tests.conftest import Run
from tests.cuda.conftest import TrainedRun
from tests.cuda.waits import no_waits
from tests.serve.serving import Server

PROMPT = ("--prompt", "the lamp and the river,", "--max-new-tokens", 12, "--temperature", 0, "--dtype", "fp32", "--json")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, far apart, and a tokenizer."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("talker")
    chat_model.save(folder, CHATML, chat_model.scattered())
    return folder


def written(onym: Run, model: Path, device: torch.device, *options: object) -> dict[str, Any]:
    done = onym("generate", model, *PROMPT, *options, "--device", device.type)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.cuda
@pytest.mark.parametrize("compile", ["auto", "off"])
def test_generate_writes_what_it_writes_on_a_cpu(cuda: torch.device, onym: Run, talker: Path, compile: str) -> None:
    expected = written(onym, talker, torch.device("cpu"), "--compile", "off")
    found = written(onym, talker, cuda, "--compile", compile)
    assert found["tokens"] == expected["tokens"]
    assert len(set(found["tokens"])) > 3
    assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)


@pytest.mark.cuda
def test_a_run_of_the_gpu_is_read_by_every_command(cuda: torch.device, onym: Run, compiled_run: TrainedRun) -> None:
    assert written(onym, compiled_run.path, cuda)["finish_reason"] in ("length", "stop")
    losses = []
    for device in (cuda.type, "cpu"):
        done = onym("evaluate", compiled_run.path, "--device", device, "--limit", "2kB", "--json")
        assert done.returncode == 0, done.stderr
        losses.append(loss_in(json.loads(done.stdout)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def loss_in(told: Any) -> float:
    """The first loss in what ``onym evaluate --json`` says."""
    if isinstance(told, dict):
        return (
            float(told["loss"]) if "loss" in told else next(loss_in(each) for each in told.values() if isinstance(each, list))
        )
    return loss_in(told[0])


@pytest.mark.cuda
def test_the_server_completes_as_the_cpu_does(cuda: torch.device, onym: Run, talker: Path, tmp_path: Path) -> None:
    """From a process of its own, with steps that are a CUDA graph; one text, and several at once."""
    expected = written(onym, talker, torch.device("cpu"), "--compile", "off")["text"]
    with Server(tmp_path, "--model", f"talker={talker}", "--device", cuda.type, compile="auto") as server:
        asked = {"model": "talker", "prompt": PROMPT[1], "max_tokens": 12, "temperature": 0}
        answer = server.complete(**asked)
        assert answer["choices"][0]["text"] == expected
        assert [choice["text"] for choice in server.complete(**asked, n=3)["choices"]] == [expected] * 3


TINY = GPTConfig.preset("nano", vocab_size=320, context_length=32)


@pytest.mark.cuda
def test_a_rung_of_the_ladder_has_its_figures(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ladder, "_TURN", 0.05)
    monkeypatch.setattr(ladder, "_MOST_PAIRS", 3)
    climbed = climb(TINY, 4, choose_compute(cuda.type, "auto"), 1.0, Display(), rungs=RUNGS[:1])
    (figure,) = climbed.figures
    assert figure.reason == ""
    assert figure.tokens_per_second is not None
    assert figure.tokens_per_second > 100
    assert figure.memory_bytes is not None
    assert figure.memory_bytes > 1e6
    assert figure.utilisation is not None
    assert 0 < figure.utilisation < 1
    assert f"{RUNGS[0].title}" in capsys.readouterr().out


@pytest.mark.cuda
def test_the_ladders_pinned_batches_are_not_waited_for(cuda: torch.device) -> None:
    step = build(Setting(TINY, 4, cuda.type, ("mask", "fused", "pinned")))
    for _ in range(3):
        step()
    with no_waits(cuda):
        step()


@pytest.mark.cuda
def test_the_doctor_names_the_gpu_and_what_it_measured_is_plausible(cuda: torch.device, onym: Run) -> None:
    done = onym("tools", "doctor", "--quick", "--json", "--device", cuda.type)
    assert done.returncode in (0, 1), done.stderr
    machine, command = (json.loads(done.stdout)[name] for name in ("machine", "command"))
    assert "onym train" in command
    assert [gpu["name"] for gpu in machine["gpus"]] == [gpu.name for gpu in find_gpus()]
    assert torch.cuda.get_device_name(cuda) in [gpu["name"] for gpu in machine["gpus"]]
    assert all(math.isfinite(rate) and rate > 1e11 for rate in machine["rates"].values())
    documented = documented_peak(torch.cuda.get_device_name(cuda))
    if documented is not None:  # a GPU that other programs use too may reach less
        narrow = max(machine["rates"].get(name, 0.0) for name in ("bf16", "fp16"))
        assert 0.3 < narrow / documented.flops < 1.05


@pytest.mark.cuda
def test_a_share_of_the_peak_is_a_share(cuda: torch.device) -> None:
    """Also where nothing is documented, as of fp32: what is measured is then what products reach, not what launching takes."""
    rates = matmul_rates(cuda, quick=True)
    for precision in ("fp32", "auto"):
        compute = choose_compute(cuda.type, precision)
        peak = peak_of(compute)
        assert math.isfinite(peak.flops)
        assert 0.3 < rates[compute.precision] / peak.flops < 3.0
    assert memory_in_use(cuda) > 0
