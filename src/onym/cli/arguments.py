"""The options of every command, a dataclass each.

Nothing here imports torch, so help pages and mistyped options are answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from onym.generate.sampling import Sampling
from onym.train.options import DataOptions, ModelOptions, OptimizationOptions, RunOptions, TrainOptions


@dataclass(frozen=True)
class TrainArguments:
    """Train a GPT on text, and save it under its own names.

    Without any option: a small GPT on the documentation that Python carries, in a few minutes on two cores. The same command
    continues a run that was stopped; of a run that exists, options that are not given are those it was started with.
    """

    data: DataOptions
    model: ModelOptions
    optimization: OptimizationOptions
    run: RunOptions
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml", help_behavior_hint="(default: none)")] = None
    """A TOML file with any of these options; what is given on the command line goes before it."""

    @property
    def options(self) -> TrainOptions:
        return TrainOptions(self.data, self.model, self.optimization, self.run)


@dataclass(frozen=True)
class GenerateArguments:
    """Continue a text with a trained GPT, token by token as they come."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help_behavior_hint="")]
    """A run, a checkpoint, a file or folder; also another program's GPT-2: model.pth, ckpt.pt, a folder of transformers."""
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none, a new document)")] = ""
    """The text to continue."""
    max_new_tokens: int = 200
    """Tokens to write at the most."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: another text each time)")] = None
    """For the same text again."""
    step: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: the newest good one)")] = "latest"
    """Of a run, which step: its number, or the name it is pinned under."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="FILE|NAME", help_behavior_hint="")] = None
    """A tokenizer.json or hub name, where the model's folder holds none."""
    part: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the model)")] = None
    """Of a file with several models, which."""
    n_heads: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: heads of size 64)")] = None
    """Attention heads, where the file does not say."""
    device: str = "cpu"
    """cpu, cuda, mps, or auto."""


@dataclass(frozen=True)
class RunsArguments:
    """List runs, the newest first; with --plot, draw their losses into one picture too."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[FOLDER|RUN ...]", help_behavior_hint="(default: runs)")
    ] = ()
    """Folders of runs, single runs, or names of runs in runs/."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Draw the losses of these runs into this picture: .png, .svg or .pdf."""
    x: Literal["steps", "tokens", "seconds"] = "tokens"
    """With --plot, what the losses are drawn over."""
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class InspectArguments:
    """Say what a file or folder is: a run, a checkpoint, a model folder, a .safetensors or .pth file. Reads headers only."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
    """A path, or a remote one (s3://…)."""
    step: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: the run's list of steps)")] = ""
    """Of a run, one step: its number, the name it is pinned under, or latest."""
    part: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the model)")] = None
    """Of a file with several models, which."""
    json: bool = False
    """One JSON object instead."""


@dataclass(frozen=True)
class VerifyArguments:
    """Read every byte and check it: of a run, all its steps. Exit code 1 and a list where something is damaged."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
    """A run, a checkpoint, a model folder or a file; also a remote one (s3://…)."""
    step: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: all)")] = ""
    """Of a run, one step alone."""
    json: bool = False
    """One JSON object instead."""


@dataclass(frozen=True)
class DiffArguments:
    """Compare two models: equal weights, or which names, shapes, dtypes and values differ. Exit code 1 where they do."""

    a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A", help_behavior_hint="")]
    """A run, a checkpoint, a model folder or a file."""
    b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B", help_behavior_hint="")]
    """What it is compared with."""
    step_a: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: latest)")] = "latest"
    """Where A is a run, which step."""
    step_b: Annotated[str, tyro.conf.arg(metavar="N|NAME", help_behavior_hint="(default: latest)")] = "latest"
    """Where B is a run, which step."""
    json: bool = False
    """One JSON object instead."""


@dataclass(frozen=True)
class ConvertArguments:
    """Write a checkpoint in another layout, read the result back, and compare every tensor. Nothing is replaced."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC", help_behavior_hint="")]
    """A run, a checkpoint, or anything of another program's: model.pth, ckpt.pt, a folder of transformers …"""
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[DST]", help_behavior_hint="")] = ""
    """A new file or folder; none with --in-place."""
    in_place: bool = False
    """Repair SRC itself: names that wrappers changed (_orig_mod. and the like), or an index that does not match its files. The
    old file stays beside it until the new one is verified."""
    to: Annotated[str | None, tyro.conf.arg(metavar="FORMAT", help_behavior_hint="(default: by the ending of DST)")] = None
    """huggingface, nanogpt, book, book-fast; safetensors and pth leave the source's names; onym is a model folder."""
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


@dataclass(frozen=True)
class PruneArguments:
    """Delete the checkpoints of a run that need not stay, once the newest was read back; or pin one so that it stays."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
    """The run, or the folder with its steps."""
    keep_last: Annotated[int, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 3)")] = 3
    """How many of the newest stay."""
    keep_every: Annotated[int, tyro.conf.arg(metavar="K", help_behavior_hint="(default: none)")] = 0
    """Those stay whose step is a multiple of this."""
    keep_best: Annotated[str, tyro.conf.arg(metavar="METRIC[:max]", help_behavior_hint="(default: none)")] = ""
    """The one with the lowest value of a metric stays, or with :max the highest."""
    dry_run: bool = False
    """Only say what would be deleted, and why the others stay."""
    pin: Annotated[int, tyro.conf.arg(metavar="STEP", help_behavior_hint="")] = -1
    """Never delete this step; --as gives it a name. Nothing is deleted now."""
    as_: Annotated[str, tyro.conf.arg(name="as", metavar="NAME", help_behavior_hint="")] = ""
    """The name for --pin; the step is found by it, as in onym generate RUN --step NAME."""
    unpin: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Take a pin away; nothing is deleted."""
    json: bool = False
    """One JSON object instead."""


@dataclass(frozen=True)
class DoctorArguments:
    """Look at this machine: what it can do, measured; the settings that suit it, and what each is worth; what is wrong, and its
    remedy. Takes about a minute, and leaves nothing behind. Exit code 1 if there is a problem that matters."""

    runs_dir: Path = RunOptions().runs_dir
    """Folder of all runs, as for train."""
    cache_dir: Path = field(default_factory=lambda: DataOptions().cache_dir)
    """Where tokenised text is cached, as for train."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto: a CUDA device where there is one, else the CPU."""
    quick: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Leave out what takes longer than a second or so: trying torch.compile, and all but a glance at the disks."""
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """One JSON object instead."""


_Int = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the preset's)")]


@dataclass(frozen=True)
class LadderArguments:
    """Measure what each technique for faster training is worth on this machine: the book's ladder, a rung at a time.

    Each rung adds one technique to those below it and is measured in turns with the rung before. Beside it stands what the book
    measured on an A100. Those that cannot apply here say why.
    """

    preset: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: gpt2-small on a GPU, mini elsewhere)")
    ] = None
    """Shape of the model: nano, micro, mini, gpt2-small, gpt2-medium, gpt2-large or gpt2-xl."""
    context_length: _Int = None
    """Tokens in a sequence."""
    batch_size: int = 8
    """Sequences in a step; the rung with a larger batch takes four times as many."""
    vocab_size: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: GPT-2's 50257; for mini without a GPU 12241)")
    ] = None
    """Rows of the embedding and of the head."""
    minutes: float = 8.0
    """Within which it ends; less time makes noisier figures, or leaves rungs out."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto: a CUDA device where there is one, else the CPU."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("ladder")
    """Where ladder.png and ladder.json are put."""
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """One JSON object instead of the table; how far it is goes to standard error."""


@dataclass(frozen=True)
class CheckResumeArguments:
    """Train without a stop, and again with SIGKILLs at random moments; compare every tensor and every row of metrics bitwise.

    Of several processes (with --processes) one is killed each time. All options of onym train may follow these, except --name
    and --runs-dir: see onym train --help. Choose few --steps, and a --save-every that gives several checkpoints. Exit code 0:
    bitwise identical; 1: not.
    """

    kills: int = 5
    """How often the second run is killed, at most."""
    kill_seed: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: another one each time)")] = None
    """Seed of the moments at which it is killed."""
    folder: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: a temporary folder)")] = None
    """Where both runs are written and stay; temporary ones are deleted if the runs are bitwise identical."""


@dataclass(frozen=True)
class CacheArguments:
    """List compiled code that is cached; move it to an equal machine (it is code), or delete it."""

    action: Annotated[
        tyro.conf.Positional[Literal["list", "export", "import", "clear"]], tyro.conf.arg(help_behavior_hint="(default: list)")
    ] = "list"
    """list what is there; export this machine's into a file; import such a file; clear all of it."""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE.tar.gz", help_behavior_hint="")] = ""
    """The file to export into, or to import."""
    i_trust_it: bool = False
    """Import the file, which is code that will run with your rights."""
    json: bool = False
    """One JSON object instead."""


COMMANDS: dict[str, type] = {
    "train": TrainArguments,
    "generate": GenerateArguments,
    "runs": RunsArguments,
    "inspect": InspectArguments,
    "verify": VerifyArguments,
    "diff": DiffArguments,
    "convert": ConvertArguments,
    "prune": PruneArguments,
}
"""Each has a module of its name in :mod:`onym.cli`, with a function ``run(given) -> exit code``."""

TOOLS: dict[str, type] = {
    "doctor": DoctorArguments,
    "ladder": LadderArguments,
    "check-resume": CheckResumeArguments,
    "cache": CacheArguments,
}
"""The same for ``onym tools``."""
