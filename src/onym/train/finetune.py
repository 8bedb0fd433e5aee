"""From the rows of a file to examples that are trained on: conversations by their template, labelled texts by their labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from onym.convert.sources import template_texts
from onym.data.batches import IGNORED_TARGET
from onym.data.chat_template import ALPACA, CONFIG, INPUT_HEADING, ChatTemplate, tokenizer_config
from onym.data.conversations import Conversation, read_conversations
from onym.data.examples import (
    Example,
    Examples,
    ExampleSet,
    chosen_to_hold_out,
    keep_examples,
    open_examples,
    require_enough,
    window_for,
)
from onym.data.labelled import Labelled, read_labelled
from onym.data.tokenizer import TURN_TOKENS, Tokenizer
from onym.errors import ConfigError, DataError
from onym.format.reader import Checkpoint
from onym.train.display import Display
from onym.train.options import TrainOptions
from onym.units import plural

_VERSION = 1  # of what is in the cache; part of its key


@dataclass(frozen=True)
class Rows:
    """What a run is fine-tuned on."""

    examples: Examples
    tokenizer: Tokenizer
    labels: tuple[str, ...] = ()
    """Of a classifier, in the order of its outputs."""
    label_counts: tuple[int, ...] = ()
    """Rows of each that are trained on."""
    texts: dict[str, str] = field(default_factory=dict)
    """Files that belong to the model, beside its tokenizer."""


def prepare_rows(
    options: TrainOptions, base: Checkpoint | None, tokenizer: Tokenizer, context_length: int, display: Display
) -> Rows:
    """Rows -> examples, from the cache where they are known already.

    Args:
        base: what is fine-tuned, or a run that continues: it says how conversations are written.
        tokenizer: of the model.
        context_length: of the model.

    Raises:
        DataError: the rows cannot be used.
    """
    source = options.finetune.source
    assert source is not None
    make = _conversations if options.finetune.task == "chat" else _labelled_texts
    with display.activity("Rows") as activity:
        rows = make(options, base, tokenizer, context_length)
        data = rows.examples.data
        activity.result = _described(rows)
    if (added := rows.tokenizer.vocab_size - tokenizer.vocab_size) > 0:
        names = " and ".join(list(rows.tokenizer.special_tokens)[-added:])
        display.note(f"The model gets {plural(added, 'new row')} in its vocabulary, for {names}, which its tokenizer lacks.")
    _show_first(rows, data, display)
    return rows


def balanced(counts: Sequence[int]) -> list[float]:
    """How much each label counts, so that all count the same in sum: rows / (labels x rows of the label).

    >>> balanced([90, 10])
    [0.5555555555555556, 5.0]
    """
    return [sum(counts) / (len(counts) * count) for count in counts]


def _conversations(options: TrainOptions, base: Checkpoint | None, tokenizer: Tokenizer, context_length: int) -> Rows:
    tuning, path = options.finetune, options.finetune.source
    assert path is not None
    texts = template_texts(base) if base is not None else {}
    template = ChatTemplate.of_texts(texts, tokenizer) if tuning.chat_template is None else None
    if template is None:
        name = tuning.chat_template or "chatml"
        wider = tokenizer.with_special_tokens(TURN_TOKENS) if name == "chatml" else tokenizer
        if wider is not tokenizer and tuning.lora is not None:
            raise ConfigError(
                "The model's tokenizer has no tokens for chatml, and an adapter has no place for their rows: give "
                "--chat-template alpaca, which needs none, or train without --lora."
            )
        tokenizer = wider
        template = ChatTemplate.named(name, tokenizer)
    heading = INPUT_HEADING if template.source == ALPACA else ""
    how = {"template": template.source, "loss_on": tuning.loss_on}
    read = read_conversations(path)

    def make() -> Iterator[Example]:
        for source, conversation in zip(read.sources, read.conversations(heading), strict=True):
            try:
                yield _answered(template, conversation, everything=tuning.loss_on == "all")
            except ConfigError as error:  # the template refuses it
                raise DataError(f"'{source}': {error}") from error

    held_out = chosen_to_hold_out(max(2, len(read.rows)), options.data.held_out)
    examples = _kept(options, tokenizer, context_length, how, make, held_out, {"kind": read.kind, "rows": len(read.rows)})
    return Rows(examples, tokenizer, texts={CONFIG: tokenizer_config(tokenizer, template, context_length)})


def _answered(template: ChatTemplate, conversation: Conversation, *, everything: bool) -> Example:
    """A conversation's tokens; the target of each is the next one, where that is said by the assistant."""
    encoded = template.encode(conversation)
    counts = [True] * len(encoded.ids) if everything else encoded.counts
    following = zip(encoded.ids[1:], counts[1:], strict=True)
    return Example(encoded.ids[:-1], [token if counted else IGNORED_TARGET for token, counted in following])


def _labelled_texts(options: TrainOptions, base: Checkpoint | None, tokenizer: Tokenizer, context_length: int) -> Rows:
    path = options.finetune.source
    assert path is not None
    read = read_labelled(path, options.data.text_field, options.finetune.label)
    labels = _in_order({row.label for row in read})
    number_of = {label: number for number, label in enumerate(labels)}

    def make() -> Iterator[Example]:
        for row in read:
            tokens = tokenizer.encode(row.text) or [tokenizer.end_of_text]
            yield Example(tokens, [*[IGNORED_TARGET] * (len(tokens) - 1), number_of[row.label]])

    held_out = _held_out_of_each(read, options.data.held_out)
    how = {"labels": list(labels), "text_field": options.data.text_field, "label": options.finetune.label}
    examples = _kept(options, tokenizer, context_length, how, make, held_out, {"kind": "text and label", "rows": len(read)})
    data = examples.data
    last = data.starts[1:] - 1
    counted = Counter(data.targets[last[~data.held_out]].tolist())
    if missing := [label for label, number in number_of.items() if not counted[number]]:
        raise DataError(f"All rows of the label {missing[0]!r} in '{path}' are too long: take --too-long cut.")
    return Rows(examples, tokenizer, labels, tuple(counted[number] for number in range(len(labels))))


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """Numbers by their value, words by the alphabet."""
    return tuple(sorted(labels, key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label)))


def _held_out_of_each(rows: Sequence[Labelled], share: float) -> NDArray[np.bool_]:
    """The same share of each label's rows."""
    held_out = np.zeros(len(rows), dtype=bool)
    places: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        places[row.label].append(place)
    for each in places.values():
        held_out[np.array(each)[chosen_to_hold_out(len(each), share)]] = True
    return held_out


def _kept(
    options: TrainOptions,
    tokenizer: Tokenizer,
    context_length: int,
    how: dict[str, Any],
    make: Any,
    held_out: NDArray[np.bool_],
    about: dict[str, Any],
) -> Examples:
    """The examples of all rows, cut or skipped where they are longer than the context."""
    tuning, path = options.finetune, options.finetune.source
    assert path is not None
    key = blake3(_bytes_of(path))
    for part in (_VERSION, tokenizer.to_json(), sorted(how.items()), tuning.too_long, context_length, options.data.held_out):
        key.update(repr(part).encode())
    folder = options.data.cache_dir / "tokens" / key.hexdigest()[:32]
    data = open_examples(folder)
    if data is None:
        kept, places, cut, skipped, without = [], [], 0, 0, 0
        for place, example in enumerate(make()):
            if len(example.tokens) > context_length:
                if tuning.too_long == "skip":
                    skipped += 1
                    continue
                cut += 1
                example = _cut(example, context_length, labelled=tuning.task == "classify")
            if all(target == IGNORED_TARGET for target in example.targets):
                without += 1
                continue
            kept.append(example)
            places.append(place)
        require_enough(len(kept), path, context_length, skipped + without)
        chosen = held_out[places]
        if chosen.all() or not chosen.any():
            chosen = chosen_to_hold_out(len(kept), options.data.held_out)
        corpus = f"{about['rows']:,} rows of {path.name}"
        about = {**about, "corpus": corpus, "source": str(path), "cut": cut, "skipped": skipped, "without_reply": without}
        data = keep_examples(folder, kept, chosen, about)
    window = window_for(data, context_length, pack=not tuning.pad)
    return Examples(path.stem, data, window, not tuning.pad)


def _cut(example: Example, length: int, *, labelled: bool) -> Example:
    """The beginning of an example; of a text its label goes to the last token that is left."""
    targets = [*example.targets[: length - 1], example.targets[-1]] if labelled else example.targets[:length]
    return Example(example.tokens[:length], targets)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _described(rows: Rows) -> str:
    examples, data = rows.examples, rows.examples.data
    about, trained = data.description, int((~data.held_out).sum())
    counted = int((data.targets != IGNORED_TARGET).sum())
    parts = [f"{about['rows']:,} of {about['kind']}"]
    if rows.labels:
        shown = ", ".join(f"{label} {count:,}" for label, count in zip(rows.labels[:8], rows.label_counts, strict=False))
        parts.append(f"to train on {trained:,} ({shown}{', …' if len(rows.labels) > 8 else ''})")
    else:
        parts.append(f"to train on {trained:,}; {counted:,} of {len(data.tokens):,} tokens count")
    parts.append(f"held out {len(data) - trained:,}")
    for what, words in (("cut", "cut to the context"), ("skipped", "longer than the context and skipped")):
        if about[what]:
            parts.append(f"{about[what]:,} {words}")
    if about["without_reply"]:
        parts.append(f"{plural(about['without_reply'], 'row')} without a token that counts within the context, left out")
    windows = examples.windows
    parts.append(f"{plural(len(windows), 'window')} of {examples.window} tokens, {windows.padding_share:.1%} padding")
    return "; ".join(parts)


def _show_first(rows: Rows, data: ExampleSet, display: Display) -> None:
    """The first row as the model sees it, with what counts in another colour, or between marks where there are no colours."""
    first = data.example(0)
    if rows.labels:
        label = rows.labels[first.targets[-1]]
        display.quote(f"The first row, whose label is {label!r}:", rows.tokenizer.decode(first.tokens))
        return
    last = first.targets[-1]  # which is no input
    tokens = [*first.tokens, *([last] if last != IGNORED_TARGET else [])]
    counts = [False, *(target != IGNORED_TARGET for target in first.targets)]
    runs: list[tuple[bool, list[int]]] = []
    for token, counted in zip(tokens, counts, strict=False):
        if not runs or runs[-1][0] != counted:
            runs.append((counted, []))
        runs[-1][1].append(token)
    display.marked(
        "The first row; what counts in the loss is marked:", [(rows.tokenizer.decode(ids), counted) for counted, ids in runs]
    )
