"""What makes compiled code valid: the facts of a machine, and the key that they make together.

Code that was compiled where one of them is different may crash, or compute something else. What torch itself looks up a graph
by (the graph, the shapes, its own settings) is not among them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import torch
from blake3 import blake3

_FORMAT = "1"  # of the folder with the code; another one is another key


def facts() -> dict[str, str]:
    """What makes compiled code valid on this machine, by name.

    The two folders are among them because torch looks C++ objects up by the compiler's whole command, include paths and all.
    """
    return {
        "format": _FORMAT,
        "torch": f"{torch.__version__}, {torch.version.git_version[:12]}",
        "torch's folder": str(Path(torch.__file__).parent),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Python's headers": sysconfig.get_path("include"),
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())).strip(),
        "processor": _processor(),
        "C++ compiler": compiler_version(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) or "none",
        "GPU": _gpus(),
    }


def key_of(facts: dict[str, str]) -> str:
    """A short hash of the facts: the name of the folder."""
    return blake3(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_facts(content: bytes) -> dict[str, str]:
    """The content of an ``about.json``.

    Raises:
        ValueError: it is none.
    """
    values = json.loads(content)
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError("no object of texts")
    return values


def _processor() -> str:
    """Its model and what it can do: C++ is compiled for the very processor (``-march=native``)."""
    model, flags = platform.processor() or platform.machine(), ""
    with suppress(OSError):
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        for name, value in re.findall(r"^(model name|flags|Features)\s*:\s*(.*)$", described, re.MULTILINE):
            if name == "model name":
                model = value
            else:
                flags = " ".join(sorted(value.split()))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {capability}{f', {blake3(flags.encode()).hexdigest()[:8]}' if flags else ''}"


def compiler_version(command: str) -> str | None:
    """The first line that a C++ compiler says of itself; None where it cannot be run."""
    question = [command] if Path(command).stem == "cl" else [command, "--version"]
    try:
        done = subprocess.run(question, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter((done.stdout or done.stderr).strip().splitlines()), command)


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    # The driver's own files, because torch would take hold of the GPU to answer, also for a command that computes on the CPU.
    described = [file.read_text(errors="replace") for file in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    names = sorted(
        {line.partition(":")[2].strip() for text in described for line in text.splitlines() if line.startswith("Model:")}
    )
    names = names or sorted({torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())})
    return f"{', '.join(names)}, {f'ROCm {torch.version.hip}' if torch.version.hip else f'CUDA {torch.version.cuda}'}"
