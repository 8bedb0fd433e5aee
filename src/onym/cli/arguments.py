"""The options of every command, a dataclass each.

Nothing here imports torch, so help pages and mistyped options are answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from onym.generation.sampling import Sampling
from onym.generation.ways import Compile, Dtype
from onym.train.finetune_options import FinetuneOptions
from onym.train.options import DataOptions, ModelOptions, OptimizationOptions, RunOptions, TrainOptions


def _arg(metavar: str | None = None, default: str = "", purpose: str | None = None) -> Any:
    """An option's metavar, the words that stand for its default, and its purpose where several commands have it."""
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, help=purpose, help_behavior_hint=hint)


_Path = Annotated[Positional[str], _arg("PATH")]
_Json = Annotated[bool, _arg(purpose="Print one JSON object instead.")]
_Heads = Annotated[int | None, _arg("INT", "by their usual size", "Attention heads, where the file does not say.")]
_Base = Annotated[float | None, _arg("FLOAT", "Llama's or Qwen's", "Base of rotary positions, where the file does not say.")]
_Context = Annotated[int | None, _arg("INT", "Llama's or Qwen's", "Tokens of a context, where a decoder's file does not say.")]
_Labels = Annotated[
    str | None, _arg("NAME,…", "0, 1, …", "A classifier's labels in the order of its head, where the file does not say.")
]
_Part = Annotated[str | None, _arg("NAME", "the model", "Of a file with several models, which: state_dict_ema, say.")]
_Step = Annotated[
    str, _arg("N|NAME", "the newest good one", "Of a run, which step: its number, or the name it is pinned under.")
]
_Int = Annotated[int | None, _arg("INT", "the preset's")]
_Device = Annotated[str, tyro.conf.arg(help="cpu, cuda, cuda:1, mps; auto: a CUDA device where there is one, else the CPU.")]


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
    finetune: FinetuneOptions
    config: Annotated[Path | None, _arg("FILE.toml", "none")] = None
    """A TOML file with any of these options; the command line overrides it."""

    @property
    def options(self) -> TrainOptions:
        return TrainOptions(self.data, self.model, self.optimization, self.run, self.finetune)


@dataclass(frozen=True)
class GenerateArguments:
    """Continue a text with a trained GPT, token by token as they come."""

    model: Annotated[Positional[str], _arg("MODEL")]
    """A run, a checkpoint, a file or folder; also another program's GPT-2, Llama or Qwen: model.pth, ckpt.pt, a folder of
    transformers."""
    prompt: Annotated[str, _arg(default="none, a new document")] = ""
    """The text to continue."""
    prompts: Annotated[str, _arg("FILE|-", "none")] = ""
    """Texts to continue instead, one a line; - reads them from standard input."""
    n: int = 1
    """Texts to write for each prompt."""
    max_new_tokens: int = 200
    """Tokens to write at the most."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Annotated[tuple[str, ...], _arg("TEXT …", "none")] = ()
    """End before the first of these strings."""
    stop_ids: Annotated[tuple[int, ...], _arg("ID …", "none")] = ()
    """End before one of these tokens, as before the end of a document."""
    logit_bias: Annotated[str, _arg("ID=BIAS,…", "none")] = ""
    """Added to the logits of these tokens: -100 forbids one."""
    seed: Annotated[int | None, _arg("INT", "another text each time")] = None
    """For the same text again. Of several texts, the seed of the first; each further one's is one higher."""
    logprobs: Annotated[int, _arg("K", "none")] = 0
    """With --json, report this many of the likeliest tokens with each one, up to 20."""
    prompt_logprobs: bool = False
    """With --json, report the log-probability of each token of the prompt."""
    dtype: Annotated[Dtype, _arg("auto|fp32|bf16|int8", "bf16 where the device multiplies it in hardware, else fp32")] = "auto"
    """Of the weights. int8 is smaller and rounds them: the loss on held-out text is printed beside that of fp32."""
    compile: Compile = "auto"
    """Whether a step is compiled; auto: where that was measured to be faster here, and is there already or pays."""
    json: Annotated[bool, _arg(purpose="Print a JSON object a text, each on a line, instead.")] = False
    step: _Step = "latest"
    tokenizer: Annotated[str | None, _arg("FILE|NAME")] = None
    """A tokenizer.json or hub name, where the model's folder holds none."""
    part: _Part = None
    n_heads: _Heads = None
    rope_base: _Base = None
    context_length: _Context = None
    device: _Device = "auto"


@dataclass(frozen=True)
class ChatArguments:
    """Converse with a model in the terminal, or by a pipe, one message a line. /help there lists what can be typed besides.

    A model that was trained on conversations has a chat template, which is used. A base model has none; it continues the text
    of all that was said.
    """

    model: Annotated[Positional[str], _arg("MODEL")]
    """A run, a checkpoint, a file or folder, as for generate."""
    system: Annotated[str, _arg("TEXT", "none")] = ""
    """The system message, which comes first: who the model is, how it should reply."""
    chat_template: Annotated[str | None, _arg("chatml|alpaca|FILE", "the model's")] = None
    """How a conversation becomes the model's text, where its folder does not say, or otherwise than it does."""
    max_new_tokens: int = 512
    """Tokens of a reply at the most."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Annotated[tuple[str, ...], _arg("TEXT …", "none")] = ()
    """End a reply before the first of these strings."""
    stop_ids: Annotated[tuple[int, ...], _arg("ID …", "none")] = ()
    """End a reply before one of these tokens, as before the end of a turn."""
    seed: Annotated[int | None, _arg("INT", "other replies each time")] = None
    """For the same replies again; each further reply's is one higher."""
    dtype: Annotated[Dtype, _arg("auto|fp32|bf16|int8", "bf16 where the device multiplies it in hardware, else fp32")] = "auto"
    """Of the weights. int8 is smaller and rounds them."""
    compile: Compile = "auto"
    """Whether a step is compiled; auto: where that was measured to be faster here, and is there already or pays."""
    step: _Step = "latest"
    tokenizer: Annotated[str | None, _arg("FILE|NAME")] = None
    """A tokenizer.json or hub name, where the model's folder holds none."""
    part: _Part = None
    n_heads: _Heads = None
    rope_base: _Base = None
    context_length: _Context = None
    device: _Device = "auto"


@dataclass(frozen=True)
class ClassifyArguments:
    """Tell the label of each text, and how probable it is: one text a line in, one label a line out."""

    model: Annotated[Positional[str], _arg("MODEL")]
    """A run, a checkpoint, a file or folder with a classifier; also transformers' and the book's."""
    text: Annotated[Positional[tuple[str, ...]], _arg("TEXT …", "the lines of standard input")] = ()
    """Texts to classify."""
    json: Annotated[bool, _arg(purpose="Print a JSON object a line, with the probabilities of all labels.")] = False
    step: _Step = "latest"
    tokenizer: Annotated[str | None, _arg("FILE|NAME")] = None
    """A tokenizer.json or hub name, where the model's folder holds none."""
    part: _Part = None
    labels: _Labels = None
    n_heads: _Heads = None
    rope_base: _Base = None
    context_length: _Context = None
    device: _Device = "auto"


@dataclass(frozen=True)
class ServeArguments:
    """Serve models to programs that speak OpenAI's interface, and to people: a page to write in, a page to watch runs on.

    Only this machine can reach it, unless --host says otherwise. Ctrl-C or SIGTERM stops it: texts under way may end first.
    """

    models: Annotated[Positional[tuple[str, ...]], _arg("[MODEL|RUN|FOLDER ...]", "runs")] = ()
    """Models as for generate, RUN@STEP for one step of a run; and at most one folder of runs, each of which can be chosen."""
    model: Annotated[tuple[str, ...], _arg("NAME=PATH …", "none")] = ()
    """Models under names that you choose."""
    host: str = "127.0.0.1"
    """The address to listen at. Others than this machine's own need an API key: 0.0.0.0 is all networks."""
    port: int = 8000
    """0 takes a free one."""
    follow: bool = False
    """Of a run that is going on, serve each newer step as soon as it is saved. A text that has begun ends on its step."""
    api_key: Annotated[str | None, _arg("KEY", "$ONYM_API_KEY, else none")] = None
    """What clients have to send. Others on this machine can see it in the list of processes; see --api-key-file."""
    api_key_file: Annotated[Path | None, _arg("FILE", "none")] = None
    """A file that holds the key."""
    allow_host: Annotated[tuple[str, ...], _arg("NAME …", "none")] = ()
    """Further names under which the server may be reached; addresses and this machine's name always may."""
    allow_origin: Annotated[tuple[str, ...], _arg("SITE …", "none")] = ()
    """Sites whose pages may use the server, as https://example.org; * for all."""
    slots: int = 8
    """Texts that are written at once. A text does not depend on what is written beside it."""
    queue: int = 32
    """Texts that wait for a slot, for each model; further ones are answered with 429, try again later."""
    grace: Annotated[str, _arg("DURATION")] = "30s"
    """How long texts under way may go on when the server is stopped."""
    chat_template: Annotated[str | None, _arg("chatml|alpaca|FILE", "the model's")] = None
    """How a conversation becomes the model's text, where its folder does not say, or otherwise than it does."""
    dtype: Annotated[Dtype, _arg("auto|fp32|bf16|int8", "bf16 where the device multiplies it in hardware, else fp32")] = "auto"
    """Of the weights. int8 is smaller and rounds them."""
    compile: Compile = "auto"
    """Whether a step is compiled; auto: where that was measured to be faster here, and is there already or pays."""
    tokenizer: Annotated[str | None, _arg("FILE|NAME")] = None
    """A tokenizer.json or hub name, where the model's folder holds none."""
    n_heads: _Heads = None
    rope_base: _Base = None
    context_length: _Context = None
    device: _Device = "auto"


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure how well models predict a text: loss, perplexity, and bits per byte, which compares between tokenizers.

    Without --data, the text is the held-out part of what the first run among the models was trained on, or else of the
    documentation that Python carries.
    """

    models: Annotated[Positional[tuple[str, ...]], _arg("MODEL [MODEL ...]")]
    """Runs, checkpoints, files or folders; also another program's GPT-2, Llama or Qwen."""
    data: Annotated[tuple[str, ...], _arg("PATH [PATH ...]", "what is held out")] = ()
    """Files, folders, globs or addresses of text, JSON lines or tables: all of it is scored."""
    text_field: str = "text"
    """Field of JSON lines, or column of tables, that holds the text."""
    limit: Annotated[str | None, _arg("SIZE", "all")] = None
    """Most text to score: 1MB, say. Documents are taken in order, and the last one is cut."""
    stride: Annotated[int | None, _arg("INT", "half of the context")] = None
    """New tokens in each window of a document that is longer than the context: fewer mean more before each, and more work."""
    suite: bool = False
    """Also answer cloze and multiple-choice questions made from held-out parts of Python's documentation."""
    step: _Step = "latest"
    all_steps: bool = False
    """Of one run, evaluate every step that is kept."""
    plot: Annotated[Path | None, _arg("FILE")] = None
    """With --all-steps, draw bits per byte and loss over the steps: .png, .svg or .pdf."""
    batch_size: int = 16
    """Windows that are computed at once; a smaller one needs less memory."""
    tokenizer: Annotated[str | None, _arg("FILE|NAME")] = None
    """A tokenizer.json or hub name, where a model's folder holds none."""
    part: _Part = None
    n_heads: _Heads = None
    rope_base: _Base = None
    context_length: _Context = None
    device: _Device = "auto"
    json: _Json = False


@dataclass(frozen=True)
class RunsArguments:
    """List runs, the newest first; with --plot, draw their losses into one picture too."""

    runs: Annotated[Positional[tuple[str, ...]], _arg("[FOLDER|RUN ...]", "runs")] = ()
    """Folders of runs, single runs, or names of runs in runs/."""
    plot: Annotated[Path | None, _arg("FILE")] = None
    """Draw the losses of these runs into this picture: .png, .svg or .pdf."""
    x: Literal["steps", "tokens", "seconds"] = "tokens"
    """With --plot, what the losses are drawn over."""
    json: _Json = False


@dataclass(frozen=True)
class InspectArguments:
    """Print what a file or folder is: a run, a checkpoint, a model folder, a .safetensors or .pth file, a folder of tokens.
    Reads headers only."""

    path: _Path
    """A path, or a remote one (s3://…)."""
    step: Annotated[str, _arg("N|NAME", "the run's list of steps")] = ""
    """Of a run, one step: its number, the name it is pinned under, or latest."""
    part: _Part = None
    json: _Json = False


@dataclass(frozen=True)
class VerifyArguments:
    """Read every byte and check it: of a run, all its steps. Exit code 1 and a list where something is damaged; exit code 3
    where nothing is, and there are no weights that can be read."""

    path: _Path
    """A run, a checkpoint, a model folder or a file; also a remote one (s3://…)."""
    step: Annotated[str, _arg("N|NAME", "all")] = ""
    """Of a run, one step alone."""
    json: _Json = False


@dataclass(frozen=True)
class DiffArguments:
    """Compare two models: equal weights, or which names, shapes, dtypes and values differ. Exit code 1 where they do."""

    a: Annotated[Positional[str], _arg("A")]
    """A run, a checkpoint, a model folder or a file."""
    b: Annotated[Positional[str], _arg("B")]
    """What it is compared with."""
    step_a: _Step = "latest"
    step_b: _Step = "latest"
    json: _Json = False


@dataclass(frozen=True)
class ConvertArguments:
    """Write a checkpoint in another layout, read the result back, and compare every tensor. Nothing is replaced."""

    source: Annotated[Positional[str], _arg("SRC")]
    """A run, a checkpoint, or anything of another program's: model.pth, ckpt.pt, a folder of transformers …"""
    destination: Annotated[Positional[str], _arg("[DST]")] = ""
    """A new file or folder; none with --in-place."""
    in_place: bool = False
    """Repair SRC itself: names that wrappers changed (_orig_mod. and the like), or an index that does not match its files. The
    old file stays beside it until the new one is verified."""
    to: Annotated[str | None, _arg("FORMAT", "by the ending of DST")] = None
    """huggingface and book take the class that fits (llama, qwen2, qwen3; book-llama3, book-qwen3); book-fast, nanogpt, gguf;
    safetensors and pth leave the source's names; onym is a model folder. Of LoRA adapters also peft, a folder of them alone,
    and book-lora, the book's file of appendix E."""
    dtype: Annotated[str | None, _arg("NAME", "the source's")] = None
    """Of the values in a .gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0."""
    part: _Part = None
    step: _Step = "latest"
    n_heads: _Heads = None
    rope_base: _Base = None
    context_length: _Context = None
    labels: _Labels = None
    vocab_size: Annotated[int | None, _arg("INT", "as it is")] = None
    """Drop the rows of the vocabulary from here on: 50257 takes the padding off a 50304."""
    shard_size: Annotated[str | None, _arg("SIZE", "one file")] = None
    """Several .safetensors files of at most this size with an index: 5GB, say."""
    tokenizer: Annotated[str | None, _arg("FILE|NAME", "the source's")] = None
    """A tokenizer.json or hub name to write beside the weights."""
    drop: Annotated[str, _arg("WORD,…", "refuse")] = ""
    """What DST cannot hold and may be dropped, by the words of the refusal."""
    merge: Annotated[str | None, _arg("BASE", "the model that SRC records")] = None
    """Of LoRA adapters, the model that they belong to, into which they are merged. With --unmerged, or --to peft or book-lora,
    the model that they are written for."""
    unmerged: bool = False
    """Of LoRA adapters, write their base as DST in transformers' layout, and the adapters as DST/adapter in peft's."""
    alpha: Annotated[float | None, _arg("FLOAT", "the rank, as in the book")] = None
    """Of the book's LoRA (appendix E), what its class multiplies the matrices' product by, which the file does not say."""
    dry_run: bool = False
    """Print what would be done, and write nothing."""
    json: _Json = False


@dataclass(frozen=True)
class PruneArguments:
    """Delete the checkpoints of a run that need not stay, once the newest was read back; or pin one so that it stays."""

    run: Annotated[Positional[str], _arg("RUN")]
    """The run, or the folder with its steps."""
    keep_last: Annotated[int, _arg("N", "3")] = 3
    """How many of the newest stay."""
    keep_every: Annotated[int, _arg("K", "none")] = 0
    """Those stay whose step is a multiple of this."""
    keep_best: Annotated[str, _arg("METRIC[:max]", "none")] = ""
    """The one with the lowest value of a metric stays, or with :max the highest."""
    dry_run: bool = False
    """Only print what would be deleted, and why the others stay."""
    pin: Annotated[int, _arg("STEP")] = -1
    """Never delete this step; --as gives it a name. Nothing is deleted now."""
    as_: Annotated[str, tyro.conf.arg(name="as", metavar="NAME", help_behavior_hint="")] = ""
    """The name for --pin; the step is found by it, as in onym generate RUN --step NAME."""
    unpin: Annotated[str, _arg("NAME")] = ""
    """Remove a pin; nothing is deleted."""
    json: _Json = False


@dataclass(frozen=True)
class DoctorArguments:
    """Look at this machine: what it can do, measured; the settings that suit it, and what each is worth; what is wrong, and its
    remedy. Takes about a minute, and leaves nothing behind. Exit code 1 if there is a problem that matters."""

    runs_dir: Path = RunOptions().runs_dir
    """Folder of all runs, as for train."""
    cache_dir: Path = field(default_factory=lambda: DataOptions().cache_dir)
    """Where tokenised text is cached, as for train."""
    device: _Device = "auto"
    quick: Annotated[bool, _arg()] = False
    """Skip what takes longer than a second or so: trying torch.compile, and all but a glance at the disks."""
    json: _Json = False


@dataclass(frozen=True)
class LadderArguments:
    """Measure what each technique for faster training is worth on this machine: the book's ladder, a rung at a time.

    Each rung adds one technique to those below it and is measured in turns with the rung before. Beside it stands what the book
    measured on an A100. Those that cannot apply here say why.
    """

    preset: Annotated[str | None, _arg("NAME", "gpt2-small on a GPU, mini elsewhere")] = None
    """Shape of the model: nano, micro, mini, gpt2-small, gpt2-medium, gpt2-large or gpt2-xl."""
    context_length: _Int = None
    """Tokens in a sequence."""
    batch_size: int = 8
    """Sequences in a step; the rung with a larger batch takes four times as many."""
    vocab_size: Annotated[int | None, _arg("INT", "GPT-2's 50257; for mini without a GPU 12241")] = None
    """Rows of the embedding and of the head."""
    minutes: float = 8.0
    """Within which it ends; less time makes noisier figures, or skips rungs."""
    device: _Device = "auto"
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("ladder")
    """Where ladder.png and ladder.json are written."""
    json: Annotated[bool, _arg()] = False
    """One JSON object instead of the table; progress goes to standard error."""


@dataclass(frozen=True)
class CheckResumeArguments:
    """Train without a stop, and again with kills at random moments; compare every tensor and every row of metrics bitwise.

    Of several processes (with --processes) one is killed each time. All options of onym train may follow these, except --name
    and --runs-dir: see onym train --help. Choose few --steps, and a --save-every that gives several checkpoints. Exit code 0:
    bitwise identical; 1: not.
    """

    kills: int = 5
    """How often the second run is killed, at most."""
    kill_seed: Annotated[int | None, _arg("INT", "another one each time")] = None
    """Seed of the moments at which it is killed."""
    folder: Annotated[Path | None, _arg("FOLDER", "a temporary folder")] = None
    """Where both runs are written and stay; temporary ones are deleted if the runs are bitwise identical."""


@dataclass(frozen=True)
class CacheArguments:
    """List what is cached: compiled code and tokenised text. Move compiled code to an equal machine (it is code), or delete it.
    Prune tokenised text, fetched files and tokenizers: delete what was used longest ago, but nothing that is in use."""

    action: Annotated[Positional[Literal["list", "export", "import", "clear", "prune"]], _arg(default="list")] = "list"
    """list what is there; export this machine's compiled code; import it; clear all of it; prune what is not compiled code."""
    file: Annotated[Positional[str], _arg("FILE.tar.gz")] = ""
    """The file to export into, or to import."""
    limit: Annotated[str, _arg("SIZE", "50GB")] = ""
    """With prune, most that stays: 20GB, say. What was used within an hour stays in any case; with 0 that is deleted too."""
    cache_dir: Path = field(default_factory=lambda: DataOptions().cache_dir)
    """Where tokenised text is cached, as for train. Compiled code is elsewhere, whatever this says."""
    i_trust_it: bool = False
    """Import the file, which is code that will run with your rights."""
    json: _Json = False


COMMANDS: dict[str, type] = {
    "train": TrainArguments,
    "evaluate": EvaluateArguments,
    "generate": GenerateArguments,
    "chat": ChatArguments,
    "serve": ServeArguments,
    "classify": ClassifyArguments,
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
