"""What a folder of transformers holds besides the weights: settings, ends of text, the tokenizer's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onym.convert.registry import Writing
from onym.convert.sources import TEMPLATE_TEXTS, as_json
from onym.data.chat_template import named_tokens, tokenizer_config
from onym.data.tokenizer import Tokenizer
from onym.format.manifest import parse_json

OURS = "onym"
"""The entry of ``config.json`` with our own configuration, where we wrote it."""
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def folder_texts(writing: Writing, settings: dict[str, Any], kept: tuple[str, ...], end: int | None = None) -> dict[str, str]:
    """The files beside the weights, by name; ``config.json`` last.

    What the texts of a source of transformers' own state besides is preserved, but for the names of code (``auto_map``); of any
    source, the chat template, and the token that ends a turn, which then ends a text.

    Args:
        settings: what ``config.json`` says of the model.
        kept: keys of the source's ``config.json`` that are preserved, if it has them.
        end: the token that ends a text, where neither a source nor a tokenizer says.
    """
    tokenizer, theirs, vocabulary = writing.tokenizer, writing.texts, writing.config["vocab_size"]
    said = parse_json(theirs.get("config.json", "{}"), "config.json")
    said = said if isinstance(said, dict) else {}
    template = {name: text for name, text in writing.beside.items() if name in TEMPLATE_TEXTS}
    files = {name: text for name, text in {**template, **theirs}.items() if name in _TOKENIZER and '"auto_map"' not in text}
    begin = end
    if tokenizer is not None:
        known = Tokenizer.from_json(tokenizer)
        files["tokenizer.json"] = tokenizer
        files.setdefault("tokenizer_config.json", tokenizer_config(known, None, writing.config["context_length"]))
        tokens = named_tokens(files)
        begin, end = (known.id_of(tokens.get(name), known.end_of_text) for name in ("bos_token", "eos_token"))
    ends = {"bos_token_id": said.get("bos_token_id", begin), "eos_token_id": said.get("eos_token_id", end)}
    ends = {key: None if isinstance(number, int) and number >= vocabulary else number for key, number in ends.items()}
    padding = {}
    if writing.config.get("labels"):
        padding = {"pad_token_id": _padding(writing, said, files, ends["eos_token_id"])}
    else:
        generation = as_json({"_from_model_config": True, **ends})
        files["generation_config.json"] = theirs.get("generation_config.json", generation)
    files["config.json"] = as_json(
        {
            **settings,
            **{key: said[key] for key in kept if key in said},
            **ends,
            **padding,
            "torch_dtype": writing.tensors.dtypes["tok_emb.weight"],
            OURS: dict(writing.config),
        }
    )
    return files


def _padding(writing: Writing, said: Mapping[str, Any], files: dict[str, str], end: Any) -> int | None:
    """The token by which transformers' classifiers find where a text ends: the one that pads, or else the one that ends texts,
    which then pads, for the tokenizer's files too.

    Args:
        said: the source's ``config.json``.
        files: the tokenizer's files, which are completed.
        end: the tokens that end a text.
    """
    choices = [said.get("pad_token_id"), *(end if isinstance(end, list) else [end])]
    known = Tokenizer.from_json(writing.tokenizer) if writing.tokenizer is not None else None
    named = named_tokens(files).get("pad_token")
    if known is not None:
        choices.insert(1, known.id_of(named, known.end_of_text))
    fitting = (number for number in choices if isinstance(number, int) and 0 <= number < writing.config["vocab_size"])
    pad = next(fitting, None)
    if pad is None:
        writing.notes.append(
            "No token is known that could pad: set model.config.pad_token_id in transformers to classify several texts at "
            "once, or give a tokenizer here (--tokenizer)."
        )
    elif known is not None and named is None and pad == known.end_of_text:
        settings = parse_json(files["tokenizer_config.json"], "tokenizer_config.json")
        files["tokenizer_config.json"] = as_json({**settings, "pad_token": known.end_of_text_token})
    return pad
