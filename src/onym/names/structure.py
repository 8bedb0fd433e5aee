"""Causes of a mismatch in structure: layers, sizes, heads, masks, adapters. See :mod:`onym.names.diagnose`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

from onym.names.case import Case
from onym.names.hints import layout_of
from onym.names.mismatch import Described, clip, listed
from onym.names.reparametrised import reparametrised
from onym.names.wrappers import AVERAGE_COUNTER


@dataclass(frozen=True)
class _Sign:
    """Tensors that only another kind of model has: a cause where the file has them, or where the model has them."""

    is_one: Callable[[str, tuple[int, ...]], bool]
    stored: str
    """The sentence where the file has them alone, with ``{count}`` and ``{example}``."""
    live: str
    """The sentence where the model has them alone."""

    def __call__(self, case: Case) -> None:
        for names, described, text in (
            (case.unexpected, case.stored, self.stored),
            (case.missing, case.model, self.live),
        ):
            if found := [name for name in names if self.is_one(name, described[name][0])]:
                case.found(text.format(count=len(found), example=clip(found[0])), found)


def _named(pattern: str) -> Callable[[str, tuple[int, ...]], bool]:
    return lambda name, _: re.search(pattern, name) is not None


def _is_causal_mask(name: str, shape: tuple[int, ...]) -> bool:
    leaf = name.rpartition(".")[2]
    square = len(shape) in (2, 4) and shape[-1:] == shape[-2:-1]
    return leaf == "masked_bias" or (leaf in ("mask", "causal_mask", "tril", "attn_mask", "bias") and square)


_AVERAGE = _Sign(
    _named(f"^{AVERAGE_COUNTER}$"),
    f"`{AVERAGE_COUNTER}` is the counter of an AveragedModel (EMA, SWA), whose averaged weights these are: load into an "
    "AveragedModel, or save onym.unwrap(averaged).",
    f"This model is an AveragedModel and the file is of a plain one, without `{AVERAGE_COUNTER}`: load into "
    "onym.unwrap(model).",
)
_QUANTISED = _Sign(
    _named(
        r"(^|\.)(qweight|qzeros|scales|g_idx|SCB|(nested_)?absmax|quant_map|quant_state(\..*)?|zero_points?|_packed_params)$"
    ),
    "Stored quantised ({example}): such weights load only into a model quantised in the same way; dequantise them first.",
    "This model is quantised ({example}): weights load only into a model quantised in the same way; dequantise them first.",
)
_BATCH_NORM = _Sign(
    _named(r"(^|\.)(running_mean|running_var|num_batches_tracked)$"),
    "Stored with BatchNorm ({example}) where this model has another norm, or none that has statistics: weights of the one mean "
    "nothing in the other.",
    "This model is with BatchNorm ({example}) where the file has another norm, or none that has statistics: weights of the one "
    "mean nothing in the other.",
)
_MASK = _Sign(
    _is_causal_mask,
    "{count} stored tensors are causal masks ({example}), which this model computes: leave them out, or pass strict=False.",
    "{count} of the model's tensors are causal masks ({example}), which were not stored: strict=False leaves them as the model "
    "built them.",
)


def _mask_size(case: Case) -> None:
    resized = [name for name, pair in case.shapes.items() if all(_is_causal_mask(name, shape) for shape in pair)]
    if resized:
        was, now = case.shapes[resized[0]]
        text = f"Stored with causal masks for a context of {was[-1]}, this model has {now[-1]}: build it with a context of "
        case.found(f"{text}{was[-1]}.", resized, structural=True)


def _adapters(case: Case) -> None:
    for names, others, whose, remedy in (
        (case.unexpected, case.missing, "Stored", "merge them into the weights before saving (peft: merge_and_unload)"),
        (case.missing, case.unexpected, "This model", "load the plain weights before adding the adapters"),
    ):
        lora = [name for name in names if re.search(r"(^|[._])lora(_|\.[AB]\b)|(^|\.)adapter", name)]
        # What they are added to has one step more: peft's base_layer, the book's linear.
        plain = {name: re.sub(r"\.(base_layer|linear)\.", ".", name) for name in names}
        moved = [name for name in names if plain[name] in others]
        if lora:
            text = f"{whose} with LoRA or adapter parameters ({clip(lora[0])}): {remedy}."
            case.found(text, [*lora, *moved, *(plain[name] for name in moved)])


_SPLIT = (
    ("W_query", "W_key", "W_value"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
_FUSED = (
    "qkv",
    "c_attn",
    "qkv_proj",
    "Wqkv",
    "wqkv",
    "query_key_value",
    "in_proj",
    "in_proj_weight",
    "in_proj_bias",
    "attn_qkv",
)


def _fused_attention(case: Case) -> None:
    for theirs, ours, stored_is_split in ((case.unexpected, case.missing, True), (case.missing, case.unexpected, False)):
        triple = next((t for t in _SPLIT if all(any(part in name.split(".") for name in theirs) for part in t)), None)
        fused = [name for name in ours if set(name.split(".")) & set(_FUSED)]
        if triple is None or not fused:
            continue
        split = [name for name in theirs if set(name.split(".")) & set(triple)]
        one = next(segment for segment in fused[0].split(".") if segment in _FUSED)
        parts = ", ".join(triple)
        if stored_is_split:
            text = (
                f"Stored with queries, keys and values apart ({parts}), this model has them in one matrix ({one}): join each "
                "three with torch.cat, in that order, or load into the class that was saved."
            )
        else:
            text = (
                f"Stored with queries, keys and values in one matrix ({one}), this model has them apart ({parts}): split each "
                "with chunk(3), or load into the class that was saved."
            )
        case.found(text, [*split, *fused])
        return


def _norm_names(case: Case) -> None:
    short, standard = "`scale` and `shift`", "`weight` and `bias`"
    for theirs, ours, was, now in (
        (case.unexpected, case.missing, short, standard),
        (case.missing, case.unexpected, standard, short),
    ):
        other = {name: re.sub(r"\bshift$", "bias", re.sub(r"\bscale$", "weight", name)) for name in theirs}
        if pairs := [(name, other[name]) for name in theirs if other[name] in ours]:
            text = f"Stored LayerNorms have {was} where this model's have {now}: the same values, so rename them."
            case.found(text, [name for pair in pairs for name in pair])


def _head(case: Case) -> None:
    for names, described, others, text in (
        (
            case.unexpected,
            case.stored,
            case.all.missing,
            "Stored with an output head ({}) that this model does not have: build the model with a head, or, where it equals "
            "the token embedding (tied), leave it out.",
        ),
        (
            case.missing,
            case.model,
            case.all.unexpected,
            "Stored without an output head ({}): it was tied to the token embedding. Tie it in this model too, or give it the "
            "embedding's values.",
        ),
    ):
        heads = [name for name in names if re.search(r"(^|\.)(out_head|lm_head|head|output|decoder|embed_out)\.weight$", name)]
        # Something else of the same parent on the other side: a LoRA layer, say.
        heads = [name for name in heads if not any(other.startswith(name.removesuffix("weight")) for other in others)]
        if len(heads) == 1 and described[heads[0]][0] in _embedding_shapes(case.stored):
            case.found(text.format(heads[0]), heads)


def _embedding_shapes(described: Described) -> set[tuple[int, ...]]:
    return {shape for name, (shape, _) in described.items() if len(shape) == 2 and _TOKENS.search(name)}


_TOKENS = re.compile(r"(^|\.)(tok_emb|token_emb\w*|wte|embed_tokens|embed|embedding|word_embeddings|emb)\.weight$")
_OUTPUT = re.compile(r"(^|\.)(out_head|lm_head|head|score|classifier|output|embed_out|fc)\.(weight|bias)$")
_POSITIONS = re.compile(r"(^|[._])(pos(ition(al|s)?)?|wpe)(\.|_emb|_enc|$)")


def _layers(case: Case) -> None:
    stored, model = _numbered(case.stored), _numbered(case.model)
    container = max(model, key=lambda name: len(model[name]), default=None)
    if container is None or container not in stored or stored[container] == model[container]:
        return
    was, now = len(stored[container]), len(model[container])
    odd = stored[container] ^ model[container]
    names = [
        name
        for name in (*case.missing, *case.unexpected)
        if name.startswith(f"{container}.") and name.removeprefix(f"{container}.").partition(".")[0] in odd
    ]
    if not names:
        return
    fewer = min(stored[container], model[container], key=len)
    if was != now and fewer != {str(number) for number in range(len(fewer))}:
        side = "the file" if was < now else "this model"
        lacking = sorted(odd, key=int)
        text = f"Of the blocks in {container}, {side} lacks {listed(lacking)}: a part of the file may be missing."
    elif was != now:
        text = f"Stored with {was} blocks, this model has {now}: {case.build_with('blocks', was)} ({container})."
    else:
        text = f"The blocks of {container} are numbered otherwise in the file ({listed(sorted(odd))}): renumber them."
    case.found(text, names, structural=True)


def _numbered(described: Iterable[str]) -> dict[str, set[str]]:
    """By container of numbered parts: the numbers."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in described:
        if match := re.match(r"(.*?)\.(\d+)\.", f".{name}"):
            found[match.group(1)[1:]].add(match.group(2))
    return found


def _vocabulary(case: Case) -> None:
    rows = {
        name: (was[0], now[0])
        for name, (was, now) in case.shapes.items()
        if len(was) == len(now)
        and len(was) in (1, 2)
        and was[0] != now[0]
        and was[1:] == now[1:]
        and not _POSITIONS.search(name)
    }
    tokens = {name: sizes for name, sizes in rows.items() if _TOKENS.search(name) or _OUTPUT.search(name)}
    for was, now in dict.fromkeys(tokens.values()):
        names = [name for name, sizes in tokens.items() if sizes == (was, now)]
        if not any(_TOKENS.search(name) for name in names):
            text = f"Stored with {was} outputs ({clip(names[0])}), this model has {now}: another number of classes?"
            case.found(text, [name for name in names if _OUTPUT.search(name)], structural=True)
            continue
        small, large = sorted((was, now))
        multiple = next((m for m in (128, 64, 32, 16, 8) if large == -(-small // m) * m and 2 * small > large), None)
        if multiple is not None:
            which = "the stored one" if large == was else "this model's"
            rest = "drop the last rows" if large == was else "add rows of zeros"
            text = (
                f"Stored with a vocabulary of {was}, this model has {now}: {which} is padded to a multiple of {multiple}. "
                f"{case.build_with('vocabulary', was).capitalize()}, or {rest}."
            )
        else:
            text = f"Stored with a vocabulary of {was}, this model has {now}: {case.build_with('vocabulary', was)}."
        case.found(text, names, structural=True)


def _context(case: Case) -> None:
    for name, (was, now) in list(case.shapes.items()):
        if _POSITIONS.search(name) and len(was) == len(now) and was[1:] == now[1:]:
            case.found(
                f"Stored for a context of {was[0]} tokens, this model has {now[0]}: {case.build_with('context', was[0])}.",
                [name],
                structural=True,
            )


def _transposed(case: Case) -> None:
    names = [
        name
        for name, (was, now) in case.shapes.items()
        if len(was) == 2
        and was == now[::-1]
        and f"{name.removesuffix('weight')}bias" not in case.shapes  # of its output's size
    ]
    if names:
        was, now = case.shapes[names[0]]
        case.found(
            f"{len(names)} matrices are transposed ({clip(names[0])}: {list(was)} stored, {list(now)} in the model), as from "
            "GPT-2's Conv1D: load value.T for them, and for the square ones of the same layers, whose shapes cannot show it.",
            names,
        )


def _width(case: Case) -> None:
    """Whatever shapes are left, if most of them differ by the same two numbers."""
    pairs: Counter[tuple[int, int]] = Counter()
    for was, now in case.shapes.values():
        if len(was) == len(now):
            pairs.update({(a, b) for a, b in zip(was, now, strict=True) if a != b})
    if not pairs:
        return
    (was_wide, now_wide), count = pairs.most_common(1)[0]
    names = [name for name, shapes in case.shapes.items() if _scaled(*shapes, was_wide, now_wide)]
    embedded = any(_TOKENS.search(name) and case.shapes[name][0][-1] == was_wide for name in names)
    if embedded:
        text = f"Stored with a width of {was_wide}, this model has {now_wide}: {case.build_with('width', was_wide)}."
        case.found(text, names, structural=True)
    elif count > 1:
        text = f"{count} sizes are {was_wide} in the file and {now_wide} in this model ({clip(names[0])}): build it as it was."
        case.found(text, names, structural=True)


def _scaled(was: tuple[int, ...], now: tuple[int, ...], was_wide: int, now_wide: int) -> bool:
    """Whether every size that differs does so by the ratio of the widths."""
    return len(was) == len(now) and all(a == b or a * now_wide == b * was_wide for a, b in zip(was, now, strict=True))


def _biases(case: Case) -> None:
    for names, described, text in (
        (case.unexpected, case.stored, "Stored with biases that this model does not have"),
        (case.missing, case.model, "Stored without biases that this model has"),
    ):
        weights = {name: f"{name.removesuffix('bias')}weight" for name in names if re.search(r"(^|\.)bias$", name)}
        biases = [name for name, weight in weights.items() if weight in described]
        fitting = [name for name in biases if weights[name] not in names]
        if fitting:
            attention = ".qkv." in fitting[0] or "W_query" in fitting[0]
            remedy = case.build_with("qkv_bias" if attention else "bias", names is case.unexpected)
            case.found(f"{text} ({clip(fitting[0])}): {remedy}.", fitting)


def _near_misses(case: Case) -> None:
    """Names that differ in one segment, the same in all of them or a misspelling, and have equal shapes."""
    holes: dict[tuple[str, ...], str] = {}
    for name in case.missing:
        for index, segments in _with_holes(name):
            holes.setdefault((str(index), *segments), name)
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for name in case.unexpected:
        for index, segments in _with_holes(name):
            twin = holes.get((str(index), *segments))
            if twin is not None and case.stored[name][0] == case.model[twin][0]:
                pairs[name.split(".")[index], twin.split(".")[index]].append((name, twin))
    for (theirs, ours), found in sorted(pairs.items(), key=lambda item: -len(item[1])):
        names = [(stored, live) for stored, live in found if stored in case.unexpected and live in case.missing]
        close = SequenceMatcher(None, theirs.lower(), ours.lower()).ratio() >= 0.6
        if not names or theirs.isdigit() or not (close or len(names) >= 3):
            continue
        example = f"{clip(names[0][0])} for {clip(names[0][1])}"
        more = f", and {len(names) - 1} more like it" if len(names) > 1 else ""
        case.found(
            f"Stored `{theirs}` where this model has `{ours}` ({example}{more}), of the same shape: rename one of the two.",
            [name for pair in names for name in pair],
        )


def _with_holes(name: str) -> Iterable[tuple[int, list[str]]]:
    segments = name.split(".")
    return ((index, [*segments[:index], "", *segments[index + 1 :]]) for index in range(len(segments)))


def _known_layouts(case: Case) -> None:
    """No name in common, and nothing that explains most of it: say whose names they are."""
    explained = sum(cause.explains for cause in case.causes)
    if explained * 2 > len(case.model) or any(name in case.model for name in case.stored) or not case.stored:
        return
    case.causes.clear()
    whose = layout_of(case.stored)
    text = f"They have the names of {whose}." if whose else "They are of another class of model."
    case.found(f"Not one stored name is one of this model's. {text} Build the class that was saved.", ())


def _parts(case: Case) -> None:
    """One side is a part of the other."""
    if case.all.shapes or len(case.model) == len(case.all.missing):
        return
    if case.unexpected and not case.causes and not case.all.missing:
        case.found(
            f"All of this model's tensors are stored, and {len(case.unexpected)} more: the file is of a larger model. "
            "strict=False leaves those out.",
            case.unexpected,
        )
    elif case.missing and not case.all.unexpected and (not case.causes or len(case.missing) > len(case.model) / 4):
        fitting = len(case.model) - len(case.all.missing)
        case.found(
            f"What is stored fits, but is {fitting} of the {len(case.model)} tensors: one shard of several, or a part of the "
            "model? strict=False leaves the others as they are.",
            case.missing,
        )


def _dtypes(case: Case) -> None:
    if not case.all.dtypes:
        return
    not_tensors = [name for name, kinds in case.all.dtypes.items() if "value" in kinds]
    if not_tensors:
        one = "stored" if case.all.dtypes[not_tensors[0]][0] == "value" else "the model's"
        text = f"{len(not_tensors)} {one} values are no tensors ({clip(not_tensors[0])}): make them so, with torch.from_numpy."
        case.found(text, not_tensors)
        return
    packed = [name for name, (was, _) in case.all.dtypes.items() if was in ("int8", "uint8")]
    kinds = Counter(case.all.dtypes.values()).most_common(1)[0][0]
    if packed:
        case.found(
            f"Stored as {case.all.dtypes[packed[0]][0]} ({clip(packed[0])}): quantised weights, to be dequantised first.",
            packed,
        )
    elif case.all.missing or case.all.unexpected or case.all.shapes:
        text = f'Stored as {kinds[0]}, this model is {kinds[1]}: dtype="cast" converts while loading (not floats to integers).'
        case.found(text, ())
    else:
        remedy = 'Pass dtype="cast" to convert while loading.'
        if _kind_of_number(kinds[0]) > _kind_of_number(kinds[1]):
            remedy = "No load converts that, because values would be lost: convert the tensors, or the model, before."
        case.found(f"Only dtypes differ: stored as {kinds[0]}, this model is {kinds[1]}. {remedy}", case.all.dtypes)


def _kind_of_number(dtype: str) -> int:
    """Each kind can hold the numbers of those before it."""
    starts = (("bool",), ("int", "uint"), ("float", "bfloat"), ("",))
    return next(rank for rank, names in enumerate(starts) if dtype.startswith(names))


CAUSES: tuple[Callable[[Case], None], ...] = (
    _AVERAGE,
    _adapters,
    reparametrised,
    _QUANTISED,
    _BATCH_NORM,
    _layers,
    _MASK,
    _mask_size,
    _fused_attention,
    _norm_names,
    _head,
    _vocabulary,
    _context,
    _transposed,
    _width,
    _biases,
    _near_misses,
    _known_layouts,
    _dtypes,
    _parts,
)
"""In the order in which they are looked for: each sees what those before have not explained."""
