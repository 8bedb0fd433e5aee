"""``onym convert``: any checkpoint into any layout that can hold it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from rich.console import Console

from onym.cli.arguments import ConvertArguments
from onym.cli.report import as_step, found_facts, print_facts, print_heading, print_json, some
from onym.convert.repair import repair
from onym.convert.write import Report, convert
from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError
from onym.train.display import Display
from onym.units import format_size, parse_size, plural

_SETTINGS = ("n_heads", "rope_base", "context_length")


def run(given: ConvertArguments) -> int:
    """``onym convert``."""
    if given.in_place:
        return _repair(given)
    if not given.destination:
        raise ConfigError("Name what to write, as in onym convert SRC DST, or give --in-place to repair SRC itself.")
    with Display(Console(stderr=True)).activity("Conversion") as activity:
        written = 0

        def progress(count: int) -> None:
            nonlocal written
            written += count
            activity(f"{format_size(written)} written", 0, 0)

        report = convert(
            given.source,
            given.destination,
            to=given.to,
            part=given.part,
            settings={name: getattr(given, name) for name in _SETTINGS},
            vocab_size=given.vocab_size,
            shard_bytes=None if given.shard_size is None else parse_size(given.shard_size, "--shard-size"),
            tokenizer=Tokenizer.load(given.tokenizer).to_json() if given.tokenizer else None,
            dtype=given.dtype,
            drop=[word for word in given.drop.split(",") if word],
            dry_run=given.dry_run,
            progress=progress,
            step=as_step(given.step),
        )
        activity.result = format_size(report.bytes)
    print_json(dataclasses.asdict(report)) if given.json else _say(report, dry_run=given.dry_run)
    return 0


def _repair(given: ConvertArguments) -> int:
    """Repair names and index of the source itself."""
    options = ("to", "part", *_SETTINGS, "vocab_size", "shard_size", "tokenizer", "drop", "dtype")
    others = [name for name in options if getattr(given, name) != getattr(ConvertArguments("", ""), name)]
    if given.destination or others:
        other = "a DST" if given.destination else "--" + others[0].replace("_", "-")
        raise ConfigError(f"--in-place changes names and index of SRC alone: it takes no {other.removeprefix('a ')}.")
    with Display(Console(stderr=True)).activity("Repair"):
        done = repair(given.source, dry_run=given.dry_run)
    if given.json:
        print_json(dataclasses.asdict(done))
        return 0
    wrappers = ", ".join(f"{segment}. in {count}" for segment, count in done.wrappers.items())
    print_heading(f"{done.path}{' (nothing was written: --dry-run)' if given.dry_run else ''}")
    print_facts(
        {
            "found": done.kind,
            "wrappers": f"{wrappers} names" if wrappers else None,
            "done": done.done,
            "compared": f"{plural(done.compared, 'tensor')}, bitwise identical" if done.compared else None,
        }
    )
    return 0


def _say(report: Report, *, dry_run: bool) -> None:
    print_heading(f"{report.source} -> {report.destination}{' (nothing was written: --dry-run)' if dry_run else ''}")
    print_facts(
        found_facts(report.found)
        | {
            "written as": report.to + (f", because {report.why_to} (--to chooses)" if report.why_to else ""),
            "done": ", ".join(f"{word} {count}" for word, count in report.rules.items())
            or "nothing: every tensor is unchanged",
            "dropped": "; ".join(some(report.dropped)) or None,
            "not used": ", ".join(some(report.unused)) or None,
            "result": f"{plural(report.tensors, 'tensor')}, {format_size(report.bytes)}",
            "compared": None
            if dry_run
            else f"{plural(report.compared, 'tensor')} read back, {report.rounded or 'bitwise identical'}"
            + (f"; logits {report.logits:.1g} apart" if report.logits is not None else ""),
        }
    )
    for note in report.notes:
        print_heading(f"  {note}", style="")
    if not dry_run:
        print(_next(report))


def _next(report: Report) -> str:
    path = shlex.quote(report.destination)
    if report.to in ("huggingface", "llama", "qwen2", "qwen3"):
        return f'Open it: AutoModelForCausalLM.from_pretrained("{report.destination}")'
    if report.to == "nanogpt":
        return "Continue in nanoGPT: copy it to its out_dir as ckpt.pt, and run python train.py --init_from=resume"
    if report.to.startswith("gguf"):
        name = shlex.quote(Path(report.destination).stem)
        beside = shlex.quote(str(Path(report.destination).with_suffix(".Modelfile")))
        return f"Run it: llama-cli -m {path} -p 'Once', or ollama create {name} -f {beside} && ollama run {name}"
    if report.to in ("book", "book-fast", "book-llama3", "book-qwen3", "pth"):
        return f'Load it: model.load_state_dict(torch.load("{report.destination}", weights_only=True))'
    return f"Look at it: onym inspect {path}"
