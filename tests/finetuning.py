"""Tasks whose right answers are known, made here: instructions about words, and messages that are advertising or not."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from onym.data.conversations import Conversation
from onym.data.tokenizer import Tokenizer
from onym.generation.chat import template_of_model
from onym.generation.engine import Engine, Request
from onym.generation.opening import open_model
from onym.generation.sampling import Sampling
from onym.generation.write import write

_TEXT = (
    "apple river stone cloud paper green table light music ocean tiger bread chair plant storm glass horse lemon money night"
)
WORDS = tuple(re.findall(r"\w+", _TEXT))
_OFFERS = ("win", "free", "prize", "cash", "claim", "urgent", "offer", "click", "bonus", "winner")
_NEWS = ("meeting", "lunch", "tomorrow", "report", "thanks", "family", "train", "home", "dinner", "weekend")
_TASKS = {
    "Write in capitals.": lambda words: " ".join(words).upper(),
    "Write the words in reverse order.": lambda words: " ".join(reversed(words)),
    "What is the first word?": lambda words: words[0],
    "What is the last word?": lambda words: words[-1],
    "Say it twice.": lambda words: " ".join([*words, *words]),
    "How many words are there?": lambda words: str(len(words)),
}


def instructions(count: int, seed: int, without: Sequence[dict[str, str]] = ()) -> list[dict[str, str]]:
    """Rows of instruction, input and output, no two of them alike, and none of ``without``."""
    draw, rows, seen = random.Random(seed), [], {(row["instruction"], row["input"]) for row in without}
    while len(rows) < count:
        words = draw.sample(WORDS, draw.randint(2, 4))
        instruction, answer = draw.choice(list(_TASKS.items()))
        if (instruction, " ".join(words)) not in seen:
            seen.add((instruction, " ".join(words)))
            rows.append({"instruction": instruction, "input": " ".join(words), "output": answer(words)})
    return rows


def messages(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts, each ``ham`` or ``spam``."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        spam = draw.random() < 0.4
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 10))]
        words += [draw.choice(_OFFERS if spam else _NEWS) for _ in range(draw.randint(1, 2))]
        draw.shuffle(words)
        rows.append((" ".join(words), "spam" if spam else "ham"))
    return rows


def write_json(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """One JSON array, as the book's file is."""
    path.write_text(json.dumps(rows))
    return path


def write_csv(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """The book's columns: label and text."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        writer.writerows((label, text) for text, label in rows)
    return path


def replies(model: Path, conversations: Sequence[Conversation]) -> list[str]:
    """What a model says in the place of each conversation's last turn, the likeliest token each time."""
    opened = open_model(model)
    template = template_of_model(opened.checkpoint, opened.tokenizer)
    assert template is not None
    tokenizer: Tokenizer = opened.tokenizer
    engine = Engine(opened.model, slots=16, dtype="fp32", compile="off")
    prompts = [template.prompt(conversation[:-1]) for conversation in conversations]
    requests = [Request(prompt, 40, Sampling(temperature=0), stop_ids=template.stop_ids) for prompt in prompts]
    texts = [""] * len(requests)
    for token in write(engine, tokenizer, requests):
        texts[token.request] += token.text
    return texts
