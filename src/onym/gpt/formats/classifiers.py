"""Heads that tell labels apart, in other programs' files: transformers' ``score``, the book's ``out_head`` with fewer rows.

The names of the labels are in transformers' ``config.json`` (``id2label``), and in no file of the book's. transformers finds
the end of a text by ``pad_token_id``. Its heads have no bias; a GPT-2's is added to the final norm's instead. Source:
``GenericForSequenceClassification`` in transformers' modeling_layers.py; chapter 6 of the book.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onym.convert.mapping import Change, Recipe, Rule, View, same, zeros
from onym.convert.registry import Config, Origin
from onym.convert.understand import shape_of
from onym.errors import CheckpointError, ConfigError
from onym.format.tensors import TensorFile
from onym.gpt.config import GPTConfig, ModelConfig
from onym.gpt.gpt2 import GPT

_EMBEDDING, _HEAD, _HEAD_BIAS, _NORM_BIAS = "tok_emb.weight", "out_head.weight", "out_head.bias", "final_norm.bias"
_SCORE, _LM_HEAD, _BOOK = "score.weight", "lm_head.weight", "out_head.weight"  # what files call a head
_OTHER_HEADS = ("score.", "classifier.", "qa_outputs.")  # of transformers' …ForTokenClassification, …ForQuestionAnswering
_FAR = 1e-5  # of logits, that a folded bias may change them by

TRANSFORMERS_HEADS: tuple[Rule, ...] = (same(_LM_HEAD, _HEAD), same(_SCORE, _HEAD))
"""The rows of a table for transformers' heads: a class has one of the two, see :func:`omitted_heads`."""


# -- read


def not_a_head(view: View, origin: Origin) -> str | None:
    """Why a head is neither a language model's nor a classifier's; None where it is one of these, or there is none."""
    if _EMBEDDING not in view.shapes:
        return None
    others = [name for name in origin.unused if name.removeprefix("model.").startswith(_OTHER_HEADS)]
    if others:
        return f"it has {others[0]}, and here a head gives one value a token or a label, for a text's last token"
    if _HEAD not in view.names:
        return None
    rows, vocabulary, called = shape_of(view, _HEAD)[0], view.shapes[_EMBEDDING][0], view.recipes[_HEAD].sources[0]
    bias = _HEAD_BIAS in view.names
    if called == _SCORE:
        settings = origin.contents.json("config.json") or {}
        if _LM_HEAD in origin.clean.names:
            return f"it has two heads, {_LM_HEAD} and {_SCORE}"
        if (kind := settings.get("problem_type")) not in (None, "single_label_classification"):
            return f"its problem_type is {kind!r}, and a classifier here gives each text one label"
    elif called != _BOOK or 2 * rows > vocabulary:
        fits = rows == vocabulary and not bias
        said = f"its head has {rows} rows{' and a bias' if bias else ''} for a vocabulary of {vocabulary}"
        return None if fits else f"{said}, which is neither a language model's nor a classifier's"
    return "its head gives one number, and a classifier here tells two labels or more apart" if rows == 1 else None


def labels_of(origin: Origin, view: View, given: Config) -> dict[str, Any]:
    """The fields of a configuration that make it a classifier's; none of a language model's.

    Args:
        given: what the user gave, perhaps with ``labels``.

    Raises:
        CheckpointError: ``id2label`` and the head differ.
        ConfigError: labels were given that the file states otherwise, or of another number.
    """
    path, names = origin.contents.path, given.get("labels")
    called = view.recipes[_HEAD].sources[0] if _HEAD in view.names else ""
    rows = shape_of(view, _HEAD)[0] if called else 0
    if called != _SCORE and (called != _BOOK or rows == view.shapes[_EMBEDDING][0]):
        if names is not None:
            raise ConfigError(f"labels cannot be given for {origin.kind}, which predicts tokens: leave them out.")
        return {}
    stated = _stated_labels(origin, rows) if called == _SCORE else None
    labels = stated or ([*names] if names is not None else [str(number) for number in range(rows)])
    if names is not None and len(names) != rows:
        raise ConfigError(f"'{path}' tells {rows} labels apart, and {len(names)} were given: give {rows} names.")
    if stated is not None and names is not None and [*names] != stated:
        raise ConfigError(f"config.json says that the labels are {', '.join(stated)}, and others were given: leave them out.")
    if stated is None and names is None:
        origin.assumed.add("labels")
        origin.notes.append(
            f"Its {rows} labels are called {labels[0]} to {labels[-1]} here: the file does not hold their names, and you can "
            "give them in the head's order (labels= or --labels)."
        )
    if origin.format is not None and origin.format.name == "book":
        origin.notes.append(
            "The script of the book's chapter 6 reads the last place of a row, padding or not, and here a text's last token is "
            "read: what that script has trained can tell other labels here."
        )
    return {"labels": labels, "head_bias": _HEAD_BIAS in view.names}


def _stated_labels(origin: Origin, rows: int) -> list[str]:
    """The names in ``id2label``; LABEL_0 and so on where there are none, as transformers has it."""
    said = (origin.contents.json("config.json") or {}).get("id2label")
    if said is None:
        return [f"LABEL_{number}" for number in range(rows)]
    if not isinstance(said, dict) or set(said) != {str(number) for number in range(rows)}:
        raise CheckpointError(
            f"'{origin.contents.path}' does not fit together: {_SCORE} has {rows} rows, and id2label in config.json does not "
            f"name the labels 0 to {rows - 1}. Take the settings that belong to the weights."
        )
    return [str(said[str(number)]) for number in range(rows)]


# -- written


def no_place_for_labels(program: str) -> Callable[[Config], str | None]:
    """What a target without classifiers refuses."""
    reason = f"{program} predicts tokens, and this one tells labels apart; --to huggingface, book and onym have a place for it"
    return lambda config: reason if config.get("labels") else None


def omitted_heads(config: Config) -> tuple[str, ...]:
    """Of transformers' two names of a head, those that a model's class does not store."""
    if config.get("labels"):
        return (_LM_HEAD,)
    return (_SCORE, _LM_HEAD) if config["tie_embeddings"] else (_SCORE,)


def sequence_classification(config: ModelConfig, language_model: str) -> dict[str, Any]:
    """What transformers' ``config.json`` says of the class, and of the labels.

    Args:
        language_model: the class for a model that predicts tokens, as ``LlamaForCausalLM``.
    """
    if not config.labels:
        return {"architectures": [language_model]}
    name = language_model.replace("LMHeadModel", "ForCausalLM").replace("ForCausalLM", "ForSequenceClassification")
    return {
        "architectures": [name],
        "id2label": {str(number): label for number, label in enumerate(config.labels)},
        "label2id": {label: number for number, label in enumerate(config.labels)},
        "problem_type": "single_label_classification",
    }


def book_head_bias(config: ModelConfig, dtype: str) -> dict[str, Recipe]:
    """The bias of zeros that the book's ``out_head`` has, for a classifier without one."""
    if not config.labels or config.head_bias:
        return {}
    return {_HEAD_BIAS: Recipe((), zeros((len(config.labels),), dtype), dtype)}


def book_labels_note(config: Config) -> str | None:
    """What the book's files do not hold of a classifier."""
    labels: Sequence[str] = config.get("labels", ())
    if not labels:
        return None
    return (
        f"It is loaded once model.out_head = torch.nn.Linear({config['emb_dim']}, {len(labels)}). The book's files do not hold "
        f"the names of labels: give labels={list(labels)!r} where it is loaded (here --labels {','.join(labels)})."
    )


def _fold(tensors: Sequence[Tensor]) -> Tensor:
    """Head [labels, emb], its bias c, perhaps the norm's bias b -> b + W⁺c, of which W makes Wb + c."""
    weight, bias, *norm = (tensor.double() for tensor in tensors)
    folded: Tensor = torch.linalg.pinv(weight) @ bias
    return (folded + norm[0] if norm else folded).to(tensors[0].dtype)


_FOLDED = Change("folded", lambda shapes: (shapes[0][1],), _fold)


def bias_in_norm(tensors: TensorFile, values: Config) -> tuple[TensorFile, Config]:
    """A GPT-2 whose head has no bias and which computes the same: the bias is added to the final norm's.

    Raises:
        CheckpointError: logits would differ by more than 1e-5, by rounding or because the head's rows depend on each other.
    """
    if not values.get("head_bias"):
        return tensors, values
    config = {**values, "head_bias": False, "bias": True}
    present, dtype = set(tensors.names), tensors.dtypes[_HEAD]
    recipes = {
        name: Recipe((name,)) if name in present else Recipe((), zeros(tuple(tensor.shape), dtype), dtype)
        for name, tensor in GPT.without_values(GPTConfig.from_dict(config)).state_dict().items()
    }
    norm = [_NORM_BIAS] if _NORM_BIAS in present else []
    recipes[_NORM_BIAS] = Recipe((_HEAD, _HEAD_BIAS, *norm), _FOLDED)
    view = View(tensors, recipes)
    weight, bias, *before = (tensors.tensor(name).double() for name in recipes[_NORM_BIAS].sources)
    shift = view.tensor(_NORM_BIAS).double() - sum(before)
    apart = float((weight @ shift - bias).abs().max())
    if not apart <= _FAR:
        raise CheckpointError(
            f"'{tensors.path}' cannot be written for transformers, whose classifiers have no bias in their head: added to the "
            f"final norm's, it would change logits by {apart:.2g}. --to book and onym keep it."
        )
    return view, config
