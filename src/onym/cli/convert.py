"""``onym convert``: any checkpoint into any layout that can hold it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from onym.adapters.conversion import BESIDE, PEFT, TARGETS, AdapterSource, write_adapter, write_beside
from onym.cli.arguments import ConvertArguments
from onym.cli.report import SETTINGS, as_step, found_facts, print_facts, print_heading, print_json, some, stated_settings
from onym.convert.repair import repair
from onym.convert.write import Report, convert
from onym.data.tokenizer import Tokenizer
from onym.errors import ConfigError
from onym.format.manifest import CONFIG
from onym.train.display import Display
from onym.units import format_size, parse_size, plural

_OPTIONS = {"vocab_size": "vocab-size", "shard_bytes": "shard-size"}


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

        report = _converted(given, progress)
        activity.result = format_size(report.bytes)
    print_json(dataclasses.asdict(report)) if given.json else _say(report, dry_run=given.dry_run)
    return 0


def _converted(given: ConvertArguments, progress: Callable[[int], None]) -> Report:
    """Write the result."""
    settings = stated_settings(given)
    how: dict[str, Any] = {
        "vocab_size": given.vocab_size,
        "shard_bytes": None if given.shard_size is None else parse_size(given.shard_size, "--shard-size"),
        "tokenizer": Tokenizer.load(given.tokenizer).to_json() if given.tokenizer else None,
        "dtype": given.dtype,
        "drop": [word for word in given.drop.split(",") if word],
    }
    ways: dict[str, Any] = {"dry_run": given.dry_run, "progress": progress}
    alone = given.to in TARGETS
    if not (alone or given.merge or given.unmerged or given.alpha is not None):
        how |= {"part": given.part, "settings": settings, "step": as_step(given.step)}
        return convert(given.source, given.destination, to=given.to, **how, **ways)
    if given.unmerged and given.to not in (None, "huggingface"):
        raise ConfigError(f"--unmerged writes the base in transformers' layout: leave --to {given.to} out.")
    if alone and (unused := next((name for name, value in how.items() if value), None)):
        raise ConfigError(f"--{_OPTIONS.get(unused, unused)} has no effect with --to {given.to}: leave it out.")
    source = AdapterSource.open(
        given.source,
        given.merge,
        step=as_step(given.step),
        alpha=given.alpha,
        part=given.part,
        settings=settings,
        need_base=given.to != PEFT,
    )
    if alone:
        assert given.to is not None
        return write_adapter(source, given.destination, given.to, **ways)
    if given.unmerged:
        return write_beside(source, given.destination, **how, **ways)
    return convert(source.merged(), given.destination, to=given.to, **how, **ways)


def _repair(given: ConvertArguments) -> int:
    """Repair names and index of the source itself."""
    adapters = ("merge", "unmerged", "alpha")
    options = ("to", "part", *SETTINGS, "vocab_size", "shard_size", "tokenizer", "drop", "dtype", *adapters)
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
    if report.to == PEFT:
        return f'Open it: PeftModel.from_pretrained(base, "{report.destination}")'
    if report.to in ("huggingface", "llama", "qwen2", "qwen3"):
        (name,) = json.loads((Path(report.destination) / CONFIG).read_text(encoding="utf-8"))["architectures"]
        auto = "AutoModelForSequenceClassification" if name.endswith("SequenceClassification") else "AutoModelForCausalLM"
        opened = f'{auto}.from_pretrained("{report.destination}")'
        adapters = Path(report.destination) / BESIDE
        return f'Open it: PeftModel.from_pretrained({opened}, "{adapters}")' if adapters.is_dir() else f"Open it: {opened}"
    if report.to == "nanogpt":
        return "Continue in nanoGPT: copy it to its out_dir as ckpt.pt, and run python train.py --init_from=resume"
    if report.to.startswith("gguf"):
        name = shlex.quote(Path(report.destination).stem)
        beside = shlex.quote(str(Path(report.destination).with_suffix(".Modelfile")))
        return f"Run it: llama-cli -m {path} -p 'Once', or ollama create {name} -f {beside} && ollama run {name}"
    if report.to in ("book", "book-fast", "book-llama3", "book-qwen3", "pth"):
        return f'Load it: model.load_state_dict(torch.load("{report.destination}", weights_only=True))'
    return f"Look at it: onym inspect {path}"
