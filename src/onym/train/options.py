"""What a user can choose for a run: one frozen dataclass a subject, checked when they are combined.

The command line is made from these: each field is a flag, its docstring the help.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from tyro.conf import Suppress, arg

from onym.data.corpus import Corpus
from onym.data.remote import Progress, is_remote, local_path
from onym.data.source_spec import PERIOD, SourceSpec
from onym.errors import ConfigError
from onym.gpt.config import ModelConfig
from onym.gpt.kinds import Arch, arch_of, config_of
from onym.train.finetune_options import FinetuneOptions
from onym.units import parse_count, parse_duration, parse_size

_NOT_OF_THE_SHAPE = ("preset", "arch", "start_from")
_OF_GPT2 = ("drop_rate", "bias", "gelu")
_OF_DECODERS = ("hidden_dim", "n_kv_groups", "head_dim", "rope_base", "norm_eps")

# How a value that may be left out is shown on the help page.
_PRESETS = "(default: the preset's)"
DEFAULT_STEPS = 800
SMALLEST_SAMPLE = 10**6
"""Bytes of text that a tokenizer is trained on, at least."""
LENGTHS = ("steps", "epochs", "tokens")
"""The options that say how long to train, each in its own unit."""
SIZES = ("batch_size", "tokens_per_step")
"""Those that say how much goes into a step."""

Parallel = Literal["ddp", "fsdp", "hybrid"]
"""How several processes hold the model."""

_PresetInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint=_PRESETS)]
_PresetFloat = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint=_PRESETS)]
_PresetStr = Annotated[str | None, arg(metavar="tanh|erf", help_behavior_hint=_PRESETS)]
_PresetBool = Annotated[bool | None, arg(metavar="{True,False}", help_behavior_hint=_PRESETS)]


@dataclass(frozen=True)
class DataOptions:
    """What to train on."""

    data: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]", help_behavior_hint="")] = ()
    """Files, folders, globs or addresses (s3://, https://, hf://datasets/) of text, JSON lines, .parquet, .arrow, datasets that
    Hugging Face saved, or token files (.bin). Without it: the documentation that Python carries."""
    mix: Annotated[tuple[str, ...], arg(metavar="NAME:WEIGHT:PATH [...]", help_behavior_hint="(default: none)")] = ()
    """Several sources instead of --data, with their shares of the tokens that are trained on: web:0.7:data/web code:0.3:src."""
    text_field: str = "text"
    """Field of JSON lines, or column of tables, that holds the text."""
    suffix: Annotated[tuple[str, ...], arg(metavar="SUFFIX [SUFFIX ...]", help_behavior_hint="(default: none)")] = ()
    """Further suffixes of text files that a folder is searched for: .rst .c"""
    held_out: float = 0.05
    """Share of the text that is held out of training, to evaluate the loss on."""
    tokenizer: Annotated[str | None, arg(metavar="FILE|NAME", help_behavior_hint="(default: train one)")] = None
    """An existing tokenizer: a tokenizer.json, a folder with one, or a name on the Hugging Face hub (gpt2)."""
    vocab_size: int = 1024
    """Vocabulary of the byte-level BPE that is trained on the text, where no tokenizer is given."""
    tokenizer_sample: str = "1GB"
    """Most text that the tokenizer is trained on, spread over all of it."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """What to do with a file that cannot be read: fail, or skip it and list it in the log and in run.json."""
    cache_dir: Path = field(
        default_factory=lambda: Path(os.environ.get("ONYM_CACHE_DIR") or platformdirs.user_cache_dir("onym"))
    )
    """Cache of tokenised text for the next run; safe to delete. The environment's ONYM_CACHE_DIR sets it too."""

    def check(self) -> None:
        """Raise a ConfigError for a value that cannot work."""
        if not 0 < self.held_out < 1:
            raise ConfigError(f"--held-out must be between 0 and 1, not {self.held_out}.")
        _require_positive(self, "vocab_size")
        if parse_size(self.tokenizer_sample, "--tokenizer-sample") < SMALLEST_SAMPLE:
            raise ConfigError(f"--tokenizer-sample {self.tokenizer_sample} is too little to train a tokenizer on: 1MB or more.")
        if self.mix and self.data:
            raise ConfigError("--mix and --data are two ways to name the text: give one of them.")
        names = [source.name for source in self.sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"--mix has two sources that are called '{twice}': give each its own name.")
        total = sum(source.weight for source in self.sources)
        if few := next((source for source in self.sources if not source.weight / total >= 1 / PERIOD), None):
            raise ConfigError(f"--mix gives '{few.name}' less than one in {PERIOD:,} tokens: give it a larger weight, or none.")
        for suffix in self.suffix:
            if not re.fullmatch(r"\.?\w[\w.+-]*", suffix):
                raise ConfigError(f"--suffix {suffix!r} is no suffix: give it as in --suffix .rst .c")

    @property
    def sources(self) -> tuple[SourceSpec, ...]:
        """The text these options name."""
        if self.mix:
            return tuple(SourceSpec.parse(text) for text in self.mix)
        return (SourceSpec("data", 1.0, self.data),)

    def corpus(self, source: SourceSpec, progress: Progress | None = None) -> Corpus:
        """The text of one of the sources; ``progress`` is called while files are fetched."""
        return Corpus(source.data, self.text_field, self.suffix, self.cache_dir, progress)

    @property
    def name(self) -> str:
        """What to call a run on this text."""
        return "-".join(source.name for source in self.sources) if self.mix else Corpus(self.data).name

    @property
    def description(self) -> str:
        """What an error or a summary calls this text."""
        return " and ".join(source.name for source in self.sources) if self.mix else Corpus(self.data).description


@dataclass(frozen=True)
class ModelOptions:
    """What to train. A value that is not given is the preset's."""

    preset: str = "nano"
    """nano, micro, mini; of GPT-2 gpt2-small, gpt2-medium, gpt2-large, gpt2-xl; of the others small (124M), medium (350M),
    qwen3-0.6b, llama3.2-1b."""
    arch: Annotated[Arch | None, arg(help_behavior_hint="(default: the preset's)")] = None
    """Kind of model. gpt2: learned positions, LayerNorm, GELU; llama: rotary positions, RMSNorm, SwiGLU, and keys and values
    that heads share; qwen3: the same with norms of queries and keys."""
    context_length: _PresetInt = None
    """Most tokens the model sees at once."""
    emb_dim: _PresetInt = None
    """Width of the model."""
    n_heads: _PresetInt = None
    """Attention heads in each block; must divide the width where --head-dim is not given."""
    n_layers: _PresetInt = None
    """Number of blocks."""
    drop_rate: _PresetFloat = None
    """Dropout probability."""
    qkv_bias: _PresetBool = None
    """Give the query, key and value projections a bias."""
    tie_embeddings: _PresetBool = None
    """Use the token embedding as the output head too."""
    bias: _PresetBool = None
    """Give the norms and the other linear layers a bias."""
    gelu: _PresetStr = None
    """Form of GELU: tanh, as in GPT-2, or erf, the exact one."""
    hidden_dim: _PresetInt = None
    """Width of the feed-forward of llama and qwen3."""
    n_kv_groups: _PresetInt = None
    """Heads of keys and values of llama and qwen3; must divide the heads."""
    head_dim: _PresetInt = None
    """Width of a head of llama and qwen3."""
    rope_base: _PresetFloat = None
    """Base of the rotary wavelengths of llama and qwen3."""
    norm_eps: _PresetFloat = None
    """What is added to the mean square in the norms of llama and qwen3."""
    rope_freq: Annotated[Mapping[str, float] | None, Suppress] = None
    """Scaling of the rotary wavelengths, taken over with --from."""
    start_from: Annotated[str | None, arg(name="from", metavar="RUN|CHECKPOINT", help_behavior_hint="(default: none)")] = None
    """Start from the weights of another run or file, in a new run: its shape and tokenizer are taken over."""

    def check(self) -> None:
        """Raise a ConfigError for a value that cannot work."""
        if self.start_from is None or self.arch is not None:  # with --from alone, the file says which kind it is
            self.config(vocab_size=1)  # whatever is wrong with the shape is said before any text is read

    @property
    def kind(self) -> Arch:
        """Which kind of model it is: the preset's, where none is given."""
        return self.arch or arch_of(self.preset)

    def config(self, vocab_size: int) -> ModelConfig:
        """The model's configuration for a tokenizer of that size."""
        given = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _NOT_OF_THE_SHAPE and value is not None
        }
        arch = self.kind
        if self.start_from is not None and arch != "gpt2":
            given["rope_freq"] = self.rope_freq  # none is a value too: the preset's is not the file's
        for name in _OF_DECODERS if arch == "gpt2" else _OF_GPT2:
            if name in given:
                other = "llama or qwen3" if arch == "gpt2" else "gpt2"
                raise ConfigError(f"{flag(name)} is of --arch {other}, and this model is of {arch}: leave one of them out.")
        return config_of(arch, self.preset, **given, vocab_size=vocab_size)


@dataclass(frozen=True)
class OptimizationOptions:
    """How to train it."""

    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint=f"(default: {DEFAULT_STEPS})")] = None
    """Optimizer steps of the whole run."""
    epochs: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(in the place of --steps)")] = None
    """Length of the run as passes over the text."""
    tokens: Annotated[str | None, arg(metavar="COUNT", help_behavior_hint="(in the place of --steps)")] = None
    """Length of the run in tokens, as 10M."""
    batch_size: int = 8
    """Sequences in a step."""
    tokens_per_step: Annotated[str | None, arg(metavar="COUNT", help_behavior_hint="(in the place of --batch-size)")] = None
    """Tokens in a step, as 32k; the nearest whole number of sequences is taken."""
    micro_batch: Annotated[str, arg(metavar="INT|auto")] = "auto"
    """Sequences that go through the model at once; their gradients are accumulated. auto: as many as fit into memory."""
    optimizer: Literal["auto", "muon", "adamw"] = "auto"
    """muon: Muon for the blocks' matrices, AdamW for the rest. auto: muon, but adamw where weights
    are sharded, where a run starts from other weights (--from), and where torch has no Muon (before 2.9)."""
    learning_rate: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: by optimizer and width)")] = None
    """Peak learning rate. The default is 1e-2 (muon) or 3e-3 (adamw) for models up to 128 wide, and falls as 1/width; a tenth
    of that where all weights of a model are fine-tuned on rows."""
    muon_learning_rate: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: by --arch)")] = None
    """Peak learning rate of Muon's matrices; it rises and falls with the other. The default is half of that, and for gpt2 the
    same."""
    muon_momentum_warmup: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 200; for gpt2 0)")] = None
    """Steps in which Muon's momentum rises from 0.85 to 0.95."""
    zero_init: bool = False
    """Start with zeros in the layers that write to the residual stream, so that each block begins as the identity."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How it continues after the warm-up. wsd: constant, and a linear decay at the end."""
    min_learning_rate: float = 0.1
    """Where it ends, as a share of the peak."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises to its peak; of fine-tuning on rows, no more than a tenth of its steps."""
    decay_share: float = 0.2
    """Share of the steps in which wsd decays."""
    weight_decay: float = 0.1
    """Decay of matrices; biases and norms have none."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 to leave it as it is."""
    ema: float = 0.0
    """Keep a moving average of the weights too, with this decay (0.999); 0 for none."""
    spike_sigma: float = 8.0
    """A step whose loss or gradient norm is this many standard deviations above the mean of the last ones is skipped; 0 to
    skip only those that are not finite."""
    patience: int = 0
    """Stop after so many evaluations without a better held-out loss; 0 never."""
    gradient_checkpointing: bool = False
    """Compute each block's activations again on the way back: less memory, a third more work."""
    packing: Literal["stream", "documents"] = "stream"
    """What a window holds. stream: the text as it follows, documents cut where a window ends; documents: whole documents, those
    that fill it best, kept apart as by --document-mask, and padding."""
    document_mask: bool = False
    """Keep the documents of a window apart: attention does not cross their boundaries, and positions restart at each."""
    seed: int = 0
    """Of the weights, the order of the data, and dropout."""

    @property
    def separates_documents(self) -> bool:
        """Whether the documents of a window do not see each other."""
        return self.document_mask or self.packing == "documents"

    def check(self) -> None:
        """Raise a ConfigError for a value that cannot work."""
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(map(flag, given))} each say how long to train: give one of them.")
        _require_positive(self, *(name for name in given if name != "tokens"), "batch_size")
        for name in ("learning_rate", "muon_learning_rate"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        if self.optimizer == "adamw":
            for name in ("muon_learning_rate", "muon_momentum_warmup"):
                if getattr(self, name):
                    raise ConfigError(f"{flag(name)} is Muon's, and the optimizer is AdamW: leave it out.")
        _require_not_negative(self, "min_learning_rate", "warmup_steps", "weight_decay", "grad_clip", "seed")
        if self.muon_momentum_warmup is not None:
            _require_not_negative(self, "muon_momentum_warmup")
        _require_not_negative(self, "spike_sigma", "patience")
        for name in ("tokens", "tokens_per_step"):
            if (value := getattr(self, name)) is not None:
                parse_count(value, flag(name))
        if self.micro_batch != "auto" and not (self.micro_batch.isdecimal() and int(self.micro_batch)):
            raise ConfigError(f"--micro-batch is a number of sequences or auto, not {self.micro_batch!r}.")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"--ema must be at least 0 and below 1, not {self.ema}.")
        if not 0 <= self.decay_share <= 1:
            raise ConfigError(f"--decay-share must be between 0 and 1, not {self.decay_share}.")
        if self.seed >= 2**63:
            raise ConfigError(f"--seed must be below 2^63, not {self.seed}.")


@dataclass(frozen=True)
class RunOptions:
    """Where it goes, and what is shown on the way."""

    name: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: that of the data)")] = None
    """Name of the run. The same name continues an unfinished run."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""
    eval_every: int = 100
    """Steps from one evaluation of the held-out loss to the next; a sample of text is written with each."""
    eval_batches: int = 20
    """Most batches in an evaluation."""
    save_every: int = 275
    """Steps from one checkpoint to the next; the last step is always saved."""
    keep_last: int = 3
    """How many of the newest checkpoints are retained."""
    keep_every: int = 0
    """Further checkpoints that are retained: those whose step is a multiple of this; 0 for none."""
    keep_best: bool = False
    """Whether the checkpoint with the lowest held-out loss is retained too."""
    log_every: int = 10
    """Steps from one line of metrics.jsonl to the next."""
    compile: Literal["auto", "whole", "blocks", "off"] = "auto"
    """Compile the model in place (torch.compile): all of it, each block, or what pays over the steps to come. Where it cannot
    work, the run reports why and continues without."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the computation; weights and optimizer state are fp32. auto: bf16 where the machine computes in it."""
    deterministic: bool = False
    """Use only algorithms that give the same bits each time on a GPU too, where it has faster ones that do not."""
    data_changed: Literal["refuse", "accept"] = "refuse"
    """Whether a run may continue although its text is another one than before."""
    time_limit: Annotated[str | None, arg(metavar="TIME", help_behavior_hint="(default: none)")] = None
    """Stop, with everything saved, before this much time has passed, as 3h55m: for batch schedulers. Exit code 75."""
    track: Annotated[Literal["tensorboard", "wandb"] | None, arg(help_behavior_hint="(default: none)")] = None
    """Send the figures there too; both are extras: pip install 'onym[tensorboard]'."""
    processes: int = 1
    """How many processes of this machine share each batch: one for each GPU. Several machines: torchrun (docs/scale.md)."""
    peer_timeout: int = 600
    """Seconds after which a process that does not answer the others is given up, and with it the run."""
    parallel: Parallel = "ddp"
    """What is sharded over the processes. ddp: nothing, each has the full model; fsdp: weights, gradients and the optimizer's
    state; hybrid: the same, among the processes of one machine."""
    gather_dtype: Literal["fp32", "bf16"] = "fp32"
    """All-gather dtype of block parameters. bf16: half as much is sent and held, and the weights of norms are rounded too."""
    cpu_offload: bool = False
    """Keep shards and the optimizer in main memory; a GPU has the block that it computes with."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto: a CUDA device where there is one, else the CPU."""

    def check(self) -> None:
        """Raise a ConfigError for a value that cannot work."""
        _require_positive(self, "eval_every", "eval_batches", "save_every", "keep_last", "log_every", "processes")
        _require_positive(self, "peer_timeout")
        if self.time_limit is not None:
            parse_duration(self.time_limit, "--time-limit")
        if self.name is not None and (not self.name or Path(self.name).name != self.name or self.name.startswith(".")):
            raise ConfigError(f"--name must be a plain folder name, not {self.name!r}; --runs-dir says where it is put.")


@dataclass(frozen=True)
class TrainOptions:
    """All of a run's options."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)

    def __post_init__(self) -> None:
        # Here rather than in each part: the command line builds the parts, and would put our sentence into its own frame.
        for part in (self.data, self.model, self.optimization, self.run, self.finetune):
            part.check()
        self._check_finetuning()
        if self.run.parallel == "ddp" and (self.run.cpu_offload or self.run.gather_dtype != "fp32"):
            given = "--cpu-offload" if self.run.cpu_offload else f"--gather-dtype {self.run.gather_dtype}"
            raise ConfigError(f"{given} is about sharded weights: add --parallel fsdp, or leave it out.")
        if self.optimization.zero_init and self.model.start_from is not None:
            raise ConfigError("--zero-init is about first weights, and --from brings others: leave one of them out.")
        if self.run.parallel != "ddp":
            flags = f"--parallel {self.run.parallel}"
            if self.optimization.optimizer == "muon":
                raise ConfigError(
                    f"Muon needs full matrices, and {flags} shards them: take --optimizer adamw, or --parallel ddp."
                )
            if self.run.precision == "fp16":
                raise ConfigError(
                    f"The gradient scaler of fp16 looks at one process's gradients alone, and {flags} shards them: take "
                    "--precision bf16 or fp32, or --parallel ddp."
                )

    def _check_finetuning(self) -> None:
        tuning, optimization = self.finetune, self.optimization
        if tuning.given is not None and self.model.start_from is None:
            raise ConfigError(f"{tuning.given} is about a trained model: name it with --from, a run or a file.")
        if tuning.source is not None:
            option = "--sft" if tuning.sft else "--classify"
            for name, there in (
                ("--data", self.data.data),
                ("--mix", self.data.mix),
                ("--packing", optimization.packing != "stream"),
                ("--document-mask", optimization.document_mask),
            ):
                if there:
                    raise ConfigError(f"{option} names the rows to train on, and {name} is about text: leave it out.")
        if tuning.lora is not None and optimization.ema:
            raise ConfigError("--ema averages all weights, and --lora trains an adapter alone: leave one of them out.")

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return run_path(self.run, self.data, self.finetune)

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> TrainOptions:
        """Read what :meth:`to_dict` gave; what an earlier version did not know is as it was then.

        Raises:
            ConfigError: a value is of another type than it was given as.
        """
        subjects: dict[str, Any] = {}
        for subject in dataclasses.fields(cls):
            default = getattr(cls(), subject.name)
            known = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
            stored = completed(subject.name, values.get(subject.name, {}))
            given = {name: value for name, value in stored.items() if name in known}
            typed = {n: type(known[n])(v) if isinstance(known[n], tuple | Path) else v for n, v in given.items()}
            subjects[subject.name] = type(default)(**{**known, **typed})
        return cls(**subjects)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """JSON values, by subject; the text by absolute paths, so that a run continues from another folder too."""
        values = dataclasses.asdict(self)
        values["data"]["data"] = [_absolute(entry) for entry in self.data.data]
        values["data"]["suffix"] = list(self.data.suffix)
        for name in ("sft", "classify"):
            if (source := values["finetune"][name]) is not None:
                values["finetune"][name] = _absolute(source)
        values["finetune"]["lora_targets"] = list(self.finetune.lora_targets)
        values["data"]["mix"] = [f"{s.name}:{s.weight!r}:{_absolute(s.data[0])}" for s in self.data.sources if self.data.mix]
        return {
            subject: {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
            for subject, fields in values.items()
        }


def run_path(run: RunOptions, data: DataOptions, finetune: FinetuneOptions) -> Path:
    """The folder of a run with these options; by default it is called as what it is trained on."""
    return run.runs_dir / (run.name or (data.name if finetune.source is None else finetune.source.stem))


def completed(subject: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """A run's options with those that change its arithmetic and came later, as they were before there were these."""
    before: dict[str, Any] = {}
    if subject == "model" and stored:
        before = {"arch": "gpt2"}
    elif subject == "optimization" and stored:
        before = {"zero_init": False, "document_mask": False, "packing": "stream"}
    return {**before, **stored}


def _absolute(entry: str) -> str:
    return entry if is_remote(entry) else str(Path(local_path(entry)).expanduser().absolute())


def flag(name: str) -> str:
    """A field's name as it is typed."""
    return "--from" if name == "start_from" else "--" + name.replace("_", "-")


def _require_positive(options: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(options, name) < float("inf"):
            raise ConfigError(f"{flag(name)} must be more than 0, not {getattr(options, name)}.")


def _require_not_negative(options: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(options, name) < float("inf"):
            raise ConfigError(f"{flag(name)} must be 0 or more, not {getattr(options, name)}.")
