"""A ``tokenizer.json`` as GGUF's metadata ``tokenizer.ggml.…``: a byte-level BPE, which llama.cpp calls ``gpt2``.

llama.cpp has the pre-tokenizers built in and knows them by names, so the one in the file has to be one of these. Its own
converter recognises a tokenizer by a hash of the ids that a text becomes, and so refuses every one that was trained elsewhere
(llama.cpp #17197). Here the regular expression itself is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers

from onym.data.chat_template import named_tokens, template_of
from onym.data.tokenizer import Tokenizer
from onym.errors import TokenizerError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
# (regular expression, whether a whole word that is a token stays one without merges) -> tokenizer.ggml.pre. The third is
# DBRX's, which has Llama 3's expression and merges everything.
_PRE = {
    ("ByteLevel", False): "gpt-2",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "dbrx",
    (_QWEN2, False): "qwen2",
}
TEXTS = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja")
"""The files beside a tokenizer.json whose content is in the metadata too."""


@dataclass(frozen=True)
class GGMLTokenizer:
    """What the metadata says of a tokenizer."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int
    eos: int
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None = None
    end_of_turn: int | None = None
    """What ends a reply, where the template writes ``eos`` there; otherwise llama.cpp looks for one that it knows."""
    notes: list[str] = field(default_factory=list)

    def write(self, writer: Any) -> None:
        """Set the keys on a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos)
        writer.add_add_bos_token(self.adds_bos)
        if self.adds_eos:
            writer.add_add_eos_token(True)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)
        if self.end_of_turn is not None:
            writer.add_eot_token_id(self.end_of_turn)


def ggml_tokenizer(text: str, rows: int, beside: Mapping[str, str]) -> GGMLTokenizer:
    """Read a ``tokenizer.json``.

    Args:
        text: of the file.
        rows: of the model's embedding; those that no token has are marked as unused.
        beside: texts of files beside it, by name: ``tokenizer_config.json`` for the special tokens and the chat template.

    Raises:
        TokenizerError: llama.cpp has no such tokenizer, or it does not fit the model.
    """
    known = Tokenizer.from_json(text)
    inner = tokenizers.Tokenizer.from_str(text)
    values = json.loads(inner.to_str())  # old files leave out what newer ones say
    named = named_tokens(beside)
    pre = _pre_of(values)
    pieces: dict[int, tuple[str, int]] = {number: (piece, _NORMAL) for piece, number in values["model"]["vocab"].items()}
    for each in values.get("added_tokens") or ():
        pieces[each["id"]] = (each["content"], _CONTROL if each.get("special") else _USER_DEFINED)
    if max(pieces) >= rows:
        raise TokenizerError(
            f"The tokenizer has {max(pieces) + 1} tokens and the model {rows} rows for them: give the tokenizer that the model "
            "was trained with (--tokenizer)."
        )
    tokens = [pieces.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(rows)]
    ids = {piece: number for number, (piece, _) in pieces.items()}
    end = ids.get(named.get("eos_token", known.end_of_text_token))
    if end is None:
        raise TokenizerError(
            "The tokenizer names no token that ends a text, and llama.cpp would take token 11 for it: give one that has "
            "<|endoftext|> (--tokenizer)."
        )
    first, last = _added(inner)
    begin = first if first is not None else ids.get(named.get("bos_token", ""), end)
    template, notes = template_of(beside), list[str]()
    ends_turns = template is not None and (tokens[end][0] in template or "eos_token" in template)
    if len(pieces) < rows:
        notes.append(f"The model has {rows} rows for {len(pieces)} tokens: the others are marked as unused.")
    if values.get("normalizer"):
        notes.append(
            "The tokenizer composes characters (NFC) and llama.cpp does not: decomposed ones become other tokens there."
        )
    return GGMLTokenizer(
        pre=pre,
        tokens=[piece for piece, _ in tokens],
        types=[kind for _, kind in tokens],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]],
        bos=begin,
        eos=end,
        adds_bos=first is not None,
        adds_eos=last is not None,
        chat_template=template,
        end_of_turn=end if ends_turns else None,
        notes=notes,
    )


def _pre_of(values: Mapping[str, Any]) -> str:
    """The name that llama.cpp has for a tokenizer's way to split texts."""
    model = values["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("unk_token") or _affixes(model):
        raise _unknown(f"its model is {model['type']}, not a byte-level BPE")
    normalizer = (values.get("normalizer") or {}).get("type", "NFC")
    if normalizer != "NFC":
        raise _unknown(f"it normalises texts ({normalizer})")
    way = values.get("pre_tokenizer") or {}
    parts = way.get("pretokenizers", [way])
    last = parts[-1]
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and last.get("use_regex", True) and not last.get("add_prefix_space", True):
        pattern = "ByteLevel"
    elif kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and not last.get("add_prefix_space", True):
        pattern = (parts[0].get("pattern") or {}).get("Regex", "")
        if parts[0].get("behavior") != "Isolated" or parts[0].get("invert"):
            pattern = ""
    else:
        raise _unknown(f"it splits texts by {', '.join(map(str, kinds))}{_prefixed(last)}")
    whole_words = bool(model.get("ignore_merges"))
    if (pattern, whole_words) not in _PRE:
        raise _unknown(f"it splits texts by {pattern!r}{' and ignores merges' if whole_words else ''}")
    return _PRE[pattern, whole_words]


def _affixes(model: Mapping[str, Any]) -> bool:
    return bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"))


def _prefixed(last: Mapping[str, Any]) -> str:
    return " with a space before the text" if last.get("add_prefix_space") else ""


def _unknown(reason: str) -> TokenizerError:
    return TokenizerError(
        f"llama.cpp has no tokenizer like this one: {reason}. It has byte-level BPEs that split texts as GPT-2, Llama 3 or "
        "Qwen2 do; onym train makes such ones."
    )


def _added(inner: tokenizers.Tokenizer) -> tuple[int | None, int | None]:
    """The tokens that the tokenizer itself puts before and after a text."""
    plain, full = (inner.encode("x", add_special_tokens=each).ids for each in (False, True))
    before = full.index(plain[0]) if plain and plain[0] in full else 0
    after = len(full) - before - len(plain)
    if before > 1 or after > 1:
        raise _unknown(f"it puts {before} tokens before a text and {after} after it")
    return (full[0] if before else None), (full[-1] if after else None)
