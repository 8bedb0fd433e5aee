"""A fine-tuning step computes what trl's SFTTrainer computes: the same rows, template and model give the same loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onym import GPT
from onym.convert.write import convert
from onym.data.chat_template import CHATML, ChatTemplate
from onym.data.conversations import Message
from onym.data.examples import ExampleWindows
from onym.gpt.documents import MARKED
from onym.train.finetune import _answered
from onym.train.options import OptimizationOptions
from onym.train.precision import Compute
from onym.train.step import Stepper
from tests import chat_model
from tests.finetuning import instructions
from tests.train.test_finetune import example_set

# trl counts what follows the token that ends a reply too, so here nothing does.
_WITHOUT_NEWLINE = CHATML.replace("'<|im_end|>' + '\\n' }}", "'<|im_end|>' }}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Path]:
    folder = tmp_path_factory.mktemp("peer")
    torch.manual_seed(0)
    gpt = chat_model.scattered()
    chat_model.save(folder / "ours", _WITHOUT_NEWLINE, gpt)
    convert(folder / "ours", folder / "hf", to="huggingface")
    return gpt, folder


def test_the_first_step_has_trls_loss(model: tuple[GPT, Path]) -> None:
    datasets, transformers, trl = (pytest.importorskip(name) for name in ("datasets", "transformers", "trl"))
    gpt, folder = model
    rows = instructions(8, seed=0)
    asked = [f"{row['instruction']}\n\n{row['input']}" for row in rows]

    template = ChatTemplate(_WITHOUT_NEWLINE, chat_model.TOKENIZER)
    examples = [
        _answered(template, (Message("user", question), Message("assistant", row["output"])), everything=False)
        for question, row in zip(asked, rows, strict=True)
    ]
    windows = ExampleWindows(example_set(examples), np.arange(8), chat_model.CONTEXT, pack=True)
    stepper = Stepper(gpt.train(), OptimizationOptions(), Compute(torch.device("cpu"), torch.float32), separator=MARKED)
    stepper.micro_batch = 1
    loss = float(stepper._backward(windows.read(np.arange(len(windows)))))

    data = [
        {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": row["output"]}]}
        for question, row in zip(asked, rows, strict=True)
    ]
    how = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        completion_only_loss=True,
        max_length=chat_model.CONTEXT,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
    )
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "hf"),
        args=how,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "hf"),
    )
    tokens = sorted(example.tokens for example in examples)
    assert sorted(row["input_ids"][:-1] for row in trainer.train_dataset) == tokens, "the same tokens"
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert len(windows) < 8, "several rows in one window, where trl has one a row"
