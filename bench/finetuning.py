"""Fine-tuning on conversations, all weights and with LoRA, against trl's SFTTrainer and peft.

    python bench/finetuning.py [--rounds 3] [--steps 4] [--shape small|tiny] [--only "onym LoRA" …]

The same model, rows, template, batch of conversations, optimizer (AdamW) and dtype (bf16 by autocast, weights in fp32); LoRA of
rank 8 on the linear layers of all blocks. What is counted are the rows' own tokens, so padding counts for nobody. trl pads the
rows of a batch to the longest of them, its default; "packed" is its --packing, which on a CPU has no kernel that keeps
rows apart, so it trains on something else. All in one process, in turns; a step of trl is timed from its callbacks, without
what its trainer does before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _measure import rounds, save_results
from onym.adapters.lora import LoRA
from onym.api import load_model
from onym.checkpoint.checkpointer import Checkpointer
from onym.convert.write import convert
from onym.data.chat_template import ChatTemplate, tokenizer_config
from onym.data.conversations import Conversation, Message
from onym.data.corpus import Corpus
from onym.data.examples import ExampleSet, ExampleWindows, window_for
from onym.data.tokenizer import Tokenizer
from onym.gpt.config import GPTConfig
from onym.gpt.documents import MARKED
from onym.gpt.gpt2 import GPT
from onym.train.dry_run import prepare
from onym.train.finetune import _answered
from onym.train.options import OptimizationOptions
from onym.train.precision import choose_compute
from onym.train.step import Stepper
from onym.train.trained import round_linears

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"emb_dim": 768, "n_heads": 12, "n_layers": 12},
    "tiny": {"emb_dim": 64, "n_heads": 2, "n_layers": 2},
}
CONTEXT, ROWS, VOCABULARY, RANK, RATE = 512, 8, 8192, 8, 1e-4
TARGET = 1.3


def conversations(count: int) -> list[Conversation]:
    """Sentences of the documentation that Python carries: 8 to 40 words asked, 8 to 120 answered."""
    draw = random.Random(0)
    words = " ".join(itertools.islice((document.text for document in Corpus().documents()), 40)).split()
    found = []
    for _ in range(count):
        start, asked, answered = draw.randrange(len(words) - 200), draw.randint(8, 40), draw.randint(8, 120)
        part = words[start : start + asked + answered]
        found.append((Message("user", " ".join(part[:asked])), Message("assistant", " ".join(part[asked:]))))
    return found


class Ours:
    """Takes steps of so many conversations each."""

    def __init__(self, folder: Path, template: ChatTemplate, rows: list[Conversation], *, lora: bool) -> None:
        examples = [_answered(template, row, everything=False) for row in rows]
        starts = np.cumsum([0, *(len(each.tokens) for each in examples)]).astype(np.int64)
        tokens, targets = (
            np.concatenate([np.asarray(getattr(each, what), dtype=np.int32) for each in examples])
            for what in ("tokens", "targets")
        )
        data = ExampleSet(folder, tokens, targets, starts, np.zeros(len(examples), dtype=bool))
        window = window_for(data, CONTEXT, pack=True)
        self.windows = ExampleWindows(data, np.arange(len(examples)), window, pack=True)
        # As many windows as hold the rows of one of trl's steps.
        self.batch = max(1, round(len(self.windows) * ROWS / len(examples)))
        self.tokens = int(data.lengths.sum()) / len(self.windows) * self.batch
        model = load_model(folder / "ours")
        assert isinstance(model, GPT)
        compute = choose_compute("cpu", "auto")
        adapters = None
        if lora:
            if compute.dtype == torch.bfloat16:
                round_linears(model)
            adapters = LoRA.apply(model, rank=RANK, alpha=2 * RANK)
        options = OptimizationOptions(optimizer="adamw", learning_rate=RATE)
        self.stepper = Stepper(model.train(), options, compute, separator=MARKED, lora=adapters)
        self.numbers: Iterator[int] = itertools.count()
        compilation, _ = prepare(self.stepper, self._batch(0), [self.batch], "whole")
        assert compilation.compiled, compilation.reason

    def _batch(self, number: int) -> Any:
        return self.windows.read((np.arange(self.batch) + number * self.batch) % len(self.windows))

    def __call__(self, steps: int) -> list[float]:
        seconds = []
        for number in itertools.islice(self.numbers, steps):
            start = time.perf_counter()
            float(self.stepper(self._batch(number), RATE, number).loss)
            seconds.append(time.perf_counter() - start)
        return seconds


class Theirs:
    """trl's SFTTrainer, for so many steps at each call."""

    def __init__(self, folder: Path, rows: list[Conversation], *, lora: bool, packed: bool = False) -> None:
        import datasets
        import peft
        import transformers
        import trl

        class Clock(transformers.TrainerCallback):  # type: ignore[misc]
            def __init__(self) -> None:
                self.seconds: list[float] = []

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.start = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.seconds.append(time.perf_counter() - self.start)

        said = [[{"role": message.role, "content": message.content} for message in row] for row in rows]
        data = datasets.Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in said])
        batch = max(1, round(ROWS * self._mean(folder, rows) / CONTEXT)) if packed else ROWS

        def make(steps: int) -> Any:
            self.clock = Clock()
            how = trl.SFTConfig(
                output_dir=str(folder / "trl"),
                per_device_train_batch_size=batch,
                max_steps=steps,
                learning_rate=RATE,
                completion_only_loss=True,
                packing=packed,
                max_length=CONTEXT,
                bf16=choose_compute("cpu", "auto").dtype == torch.bfloat16,
                gradient_checkpointing=False,
                optim="adamw_torch_fused",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                seed=next(self.seeds),
            )
            config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            return trl.SFTTrainer(
                model=transformers.AutoModelForCausalLM.from_pretrained(folder / "hf"),
                args=how,
                train_dataset=data,
                processing_class=transformers.AutoTokenizer.from_pretrained(folder / "hf"),
                peft_config=config if lora else None,
                callbacks=[self.clock],
            )

        self.seeds: Iterator[int] = itertools.count()
        self.make = make
        self.tokens = ROWS * self._mean(folder, rows) if not packed else batch * CONTEXT

    @staticmethod
    def _mean(folder: Path, rows: list[Conversation]) -> float:
        tokenizer = Tokenizer.load(folder / "hf")
        template = ChatTemplate.named("chatml", tokenizer)
        return statistics.fmean(len(template.encode(row).ids) for row in rows)

    def __call__(self, steps: int) -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = self.make(steps + 1)
            trainer.train()
        return self.clock.seconds[1:]  # the first allocates the optimizer's state


def prepare_models(folder: Path, shape: str) -> ChatTemplate:
    tokenizer = Tokenizer.train((document.text for document in Corpus().documents()), VOCABULARY)
    template = ChatTemplate.named("chatml", tokenizer)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, context_length=CONTEXT, qkv_bias=True, **SHAPES[shape]))
    texts = {"tokenizer.json": tokenizer.to_json(), "tokenizer_config.json": tokenizer_config(tokenizer, template, CONTEXT)}
    with Checkpointer(folder / "ours") as checkpointer:
        checkpointer.save(1, {"model": model}, files=texts)
    convert(folder / "ours", folder / "hf", to="huggingface")
    return template


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = prepare_models(folder, given.shape)
        rows = conversations(40 * ROWS)
        makers: dict[str, Callable[[], Any]] = {
            "trl": lambda: Theirs(folder, rows, lora=False),
            "trl packed": lambda: Theirs(folder, rows, lora=False, packed=True),
            "onym": lambda: Ours(folder, template, rows, lora=False),
            "trl + peft LoRA": lambda: Theirs(folder, rows, lora=True),
            "onym LoRA": lambda: Ours(folder, template, rows, lora=True),
        }
        programs = {name: make() for name, make in makers.items() if given.only is None or name in given.only}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for round_ in rounds(given.rounds + 1):
            order = list(programs)
            for name in order if round_ % 2 else reversed(order):
                taken = programs[name](given.steps)
                if round_:  # the first finds cold caches
                    seconds[name].append(statistics.median(taken))
        rates = {name: [programs[name].tokens / each for each in taken] for name, taken in seconds.items()}
        print(f"{given.shape}: {ROWS} conversations a step, tokens/s of their own (median of {given.rounds} rounds)")
        for name, each in rates.items():
            print(f"  {name:18} {statistics.median(each):8,.0f}   {min(each):,.0f} to {max(each):,.0f}")
        ratios = {}
        for ours, peer in (("onym", "trl"), ("onym", "trl packed"), ("onym LoRA", "trl + peft LoRA")):
            if ours in rates and peer in rates:
                ratios[f"{ours} / {peer}"] = statistics.median(a / b for a, b in zip(rates[ours], rates[peer], strict=True))
                print(f"  {ours} / {peer}: {ratios[f'{ours} / {peer}']:.2f} (at least {TARGET} is wanted)")
        if given.shape == "small":
            save_results("finetuning", {"tokens_per_second": rates, "ratios": ratios})


if __name__ == "__main__":
    main()
