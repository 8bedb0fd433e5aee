"""What a user can choose for fine-tuning: the rows, LoRA, a classifier's labels, which weights train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from onym.errors import ConfigError

Task = Literal["chat", "classify"]
"""What a model is fine-tuned to do: answer, or tell labels apart."""
DEFAULT_EPOCHS: dict[Task, float] = {"chat": 2.0, "classify": 5.0}
"""The book's, in its chapters 7 and 6."""


@dataclass(frozen=True)
class FinetuneOptions:
    """How to make a trained model (--from) one that answers or classifies."""

    sft: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Conversations to train on instead of --data: rows with messages, with prompt and completion, or with instruction, input
    and output; .jsonl, .json, .csv, .tsv, .parquet, .arrow."""
    chat_template: Annotated[str | None, arg(metavar="NAME|FILE", help_behavior_hint="(default: the model's, or chatml)")] = (
        None
    )
    """How a conversation becomes a text: chatml, alpaca, or a file with a Jinja template."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens of a conversation count: what the assistant says, with what ends it, or all."""
    classify: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Labelled texts to train a classifier on instead of --data, in files of the same kinds; --text-field names the text."""
    label: str = "label"
    """Column or field that holds the label."""
    class_weights: Literal["none", "balanced"] = "none"
    """How much a label counts in the loss. balanced: each the same in sum, however few rows it has."""
    too_long: Literal["cut", "skip"] = "cut"
    """What to do with a row that is longer than the context: cut its end off, or leave it out."""
    pad: bool = False
    """Give each row a window of its own, padded, instead of packing several into one."""
    lora: Annotated[int | None, arg(metavar="RANK", help_behavior_hint="(default: none, train the weights)")] = None
    """Train a low-rank adapter of this rank, and leave the weights as they are: small checkpoints, less memory."""
    lora_alpha: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: twice the rank)")] = None
    """Scale of the adapter: its product is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapter's input."""
    lora_targets: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all of the blocks')")] = ()
    """Linear layers that get an adapter, by parts of their names: att ff, att.qkv, trf_blocks.3"""
    base_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the frozen linear layers under an adapter. auto: that of the computation, which rounds them anyway."""
    train_only: Annotated[str | None, arg(metavar="NAME,...", help_behavior_hint="(default: everything)")] = None
    """Weights that train, by parts of their names; the others are frozen: trf_blocks.11,final_norm,out_head"""

    @property
    def task(self) -> Task | None:
        """None where the data is text."""
        return "chat" if self.sft is not None else "classify" if self.classify is not None else None

    @property
    def source(self) -> Path | None:
        """The file with the rows."""
        name = self.sft or self.classify
        return None if name is None else Path(name).expanduser()

    @property
    def given(self) -> str | None:
        """The first option that only a trained model can be given, as it is typed."""
        named = {"--sft": self.sft, "--classify": self.classify, "--lora": self.lora, "--train-only": self.train_only}
        return next((name for name, value in named.items() if value is not None), None)

    def check(self) -> None:
        """Raise a ConfigError for a value that cannot work."""
        if self.sft is not None and self.classify is not None:
            raise ConfigError("--sft trains a model that answers, and --classify one that classifies: give one of them.")
        for name, value in (("--chat-template", self.chat_template), ("--loss-on", self.loss_on != "assistant" or None)):
            if value is not None and self.sft is None:
                raise ConfigError(f"{name} is about conversations: add --sft, or leave it out.")
        if self.class_weights != "none" and self.classify is None:
            raise ConfigError("--class-weights is about labels: add --classify, or leave it out.")
        if self.pad and self.task is None:
            raise ConfigError("--pad is about rows: add --sft or --classify, or leave it out.")
        if self.lora is None:
            for name, there in (
                ("--lora-alpha", self.lora_alpha is not None),
                ("--lora-dropout", self.lora_dropout != 0),
                ("--lora-targets", bool(self.lora_targets)),
                ("--base-dtype", self.base_dtype != "auto"),
            ):
                if there:
                    raise ConfigError(f"{name} is about an adapter: add --lora RANK, or leave it out.")
            return
        if self.lora < 1:
            raise ConfigError(f"--lora must be a rank of at least 1, not {self.lora}.")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < float("inf"):
            raise ConfigError(f"--lora-alpha must be more than 0, not {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"--lora-dropout must be at least 0 and below 1, not {self.lora_dropout}.")
        if self.train_only is not None:
            raise ConfigError("--lora freezes all weights, and --train-only says which train: give one of them.")
        if self.classify is not None:
            raise ConfigError("--classify trains a new head, which an adapter does not have: take --train-only, or no --lora.")
