"""``onym convert``: any checkpoint into any layout that can hold it."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console

from onym.cli.report import as_step, counted, print_facts, print_heading, print_json
from onym.convert.write import TARGETS, Report, convert
from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError
from onym.train.display import Display, size

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class _Arguments:
    """Write a checkpoint in another layout, read the result back, and compare every tensor. Nothing is replaced."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC", help_behavior_hint="")]
    """A run, a checkpoint, or anything of another program's: model.pth, ckpt.pt, a folder of transformers …"""
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST", help_behavior_hint="")]
    """A file or folder that is not there yet."""
    to: Annotated[str | None, tyro.conf.arg(metavar="|".join(TARGETS), help_behavior_hint="(default: as DST ends)")] = None
    """The layout. safetensors and pth keep the source's own, under clean names."""
    part: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the model)")] = None
    """Of a file with several models, which: state_dict_ema, say."""
    step: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: the newest good one)")] = "latest"
    """Of a run, which step."""
    n_heads: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: heads of size 64)")] = None
    """Attention heads, where the source does not say."""
    vocab_size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: as it is)")] = None
    """Leave out the rows of the vocabulary from here on: 50257 takes the padding off a 50304."""
    shard_size: Annotated[str | None, tyro.conf.arg(metavar="SIZE", help_behavior_hint="(default: one file)")] = None
    """Several .safetensors files of at most this size with an index: 5GB, say."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="FILE|NAME", help_behavior_hint="(default: the source's)")] = None
    """A tokenizer.json or hub name to put beside the weights."""
    drop: Annotated[str, tyro.conf.arg(metavar="WORD,…", help_behavior_hint="(default: refuse)")] = ""
    """What to do without that DST cannot hold, by the words that the refusal says."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    json: bool = False
    """One JSON object instead."""


def run(arguments: list[str]) -> int:
    """``onym convert``."""
    given = tyro.cli(_Arguments, prog="onym convert", args=arguments)
    with Display(Console(stderr=True)).activity("Conversion") as activity:
        written = 0

        def progress(count: int) -> None:
            nonlocal written
            written += count
            activity(f"{size(written)} written", 0, 0)

        report = convert(
            given.source,
            given.destination,
            to=given.to,
            part=given.part,
            n_heads=given.n_heads,
            vocab_size=given.vocab_size,
            shard_bytes=_bytes(given.shard_size),
            tokenizer=Tokenizer.load(given.tokenizer).to_json() if given.tokenizer else None,
            drop=[word for word in given.drop.split(",") if word],
            dry_run=given.dry_run,
            progress=progress,
            step=as_step(given.step),
        )
        activity.result = size(report.bytes)
    print_json(dataclasses.asdict(report)) if given.json else _say(report, dry_run=given.dry_run)
    return 0


def _say(report: Report, *, dry_run: bool) -> None:
    print_heading(f"{report.source} -> {report.destination}{' (nothing was written: --dry-run)' if dry_run else ''}")
    print_facts(
        found_facts(report.found)
        | {
            "written as": report.to + (f", because {report.why_to} (--to chooses)" if report.why_to else ""),
            "done": ", ".join(f"{word} {count}" for word, count in report.rules.items()) or "nothing: every tensor as it was",
            "left out": "; ".join(_some(report.dropped)) or None,
            "not used": ", ".join(_some(report.unused)) or None,
            "result": f"{counted(report.tensors, 'tensor')}, {size(report.bytes)}",
            "compared": None
            if dry_run
            else f"{counted(report.compared, 'tensor')} read back, equal bit for bit"
            + (f"; logits {report.logits:.1g} apart" if report.logits is not None else ""),
        }
    )
    for note in report.notes:
        print_heading(f"  {note}", style="")
    if not dry_run:
        print(_next(report))


def found_facts(found: Mapping[str, Any] | None) -> dict[str, str | None]:
    """How a source was understood, for a report."""
    if found is None:
        return {"found": "a checkpoint of Onym's own"}
    wrappers = ", ".join(f"{segment}. in {count}" for segment, count in found["wrappers"].items())
    return {
        "found": found["kind"],
        "known by": found["why"] or None,
        "wrappers": f"{wrappers} names" if wrappers else None,
        "also there": ", ".join(_some(found["further"])) or None,
    }


def _some(items: list[str], most: int = 5) -> list[str]:
    items = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", item) for item in items))
    return [*items[:most], f"and {len(items) - most} more"] if len(items) > most else items


def _next(report: Report) -> str:
    path = shlex.quote(report.destination)
    if report.to == "huggingface":
        return f'Open it: AutoModelForCausalLM.from_pretrained("{report.destination}")'
    if report.to == "nanogpt":
        return "Go on in nanoGPT: put it in its out_dir as ckpt.pt, and python train.py --init_from=resume"
    if report.to in ("book", "book-fast", "pth"):
        return f'Load it: model.load_state_dict(torch.load("{report.destination}", weights_only=True))'
    return f"Look at it: onym inspect {path}"


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise ConfigError(f"--shard-size {text!r} is no size: give a number with KB, MB or GB, as 5GB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])
