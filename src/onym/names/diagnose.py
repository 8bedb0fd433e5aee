"""Why a file and a model differ: the likely causes, each with its remedy.

Each known cause is a function that looks for its own signs in what has not been explained yet. What it recognises is taken off
the list, so that no cause is reported twice under other names. A cause is reported earlier the more it explains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from onym.names.case import Case
from onym.names.match import recover_names
from onym.names.mismatch import Cause, Described, Differences, listed
from onym.names.structure import CAUSES
from onym.names.wrappers import wrapper_prefixes


def diagnose(differences: Differences, stored: Described, model: Described) -> list[Cause]:
    """The likely causes, those that explain most first."""
    case = Case(differences, stored, model)
    _optimizer_file(case)
    _nested(case)
    if not case.causes:
        _wrapper_prefixes(case)
        _task_prefix(case)
        renamed = list(case.causes)  # they come first: the others are reported under the model's names
        case.causes.clear()
        for look_for in CAUSES:
            look_for(case)
        case.causes.sort(key=lambda cause: -cause.explains)
        case.causes[:0] = renamed
    return case.causes


_OPTIMIZER = "This is the state of an optimizer, not of a model: give the model's (of a checkpoint, model.safetensors)."


def _optimizer_file(case: Case) -> None:
    slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "step", "row_var", "col_var", "variance", "sum")
    theirs = [name for name in case.unexpected if name.startswith(tuple(f"state.{slot}." for slot in slots))]
    if theirs and len(theirs) > len(case.stored) / 2:
        case.found(_OPTIMIZER, theirs)


def _nested(case: Case) -> None:
    if not case.stored:
        case.found("Nothing is stored: the file, or the dict, is empty.", case.missing)
    if not case.unexpected or any(kind != "value" for _, kind in case.stored.values()):
        return
    if set(case.stored) == {"state", "param_groups"}:
        case.found(_OPTIMIZER, case.unexpected)
    else:
        named = sorted(case.unexpected, key=lambda name: "model" not in name and "state" not in name)
        case.found(
            f"It has no tensors at its top level but {listed(list(case.unexpected))}: pass what is in one of them, as "
            f"state[{named[0]!r}].",
            case.unexpected,
        )


def _wrapper_prefixes(case: Case) -> None:
    renames = recover_names(case.stored, case.model)
    if not renames:
        return
    prefixes = wrapper_prefixes()
    segments = Counter(segment for name in renames for segment in name.split(".")[:-1] if segment in prefixes)
    kept = Counter(segment for name in renames.values() for segment in name.split(".")[:-1] if segment in prefixes)
    added = [segment for segment in segments if segments[segment] > kept[segment]]
    case.rename(
        f"Stored names contain {_and(f'`{segment}.`' for segment in added)}: they were saved from a wrapped model "
        f"({_and(dict.fromkeys(_WRAPPER_WORDS.get(segment, 'a wrapper') for segment in added))}). "
        "onym.load(path, into=model) renames them.",
        renames,
    )


_WRAPPER_WORDS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Fabric",
    "_original_module": "Fabric",
}


def _task_prefix(case: Case) -> None:
    for longer, shorter, stored_is_longer in ((case.unexpected, case.missing, True), (case.missing, case.unexpected, False)):
        votes: Counter[str] = Counter()
        for name in longer:
            head, dot, rest = name.partition(".")
            prefix = head + dot
            while rest:
                if rest in shorter:
                    votes[prefix] += 1
                    break
                head, dot, rest = rest.partition(".")
                prefix += head + dot
        if not votes:
            continue
        prefix, count = votes.most_common(1)[0]
        if count < 2 and count < len(longer):
            continue
        pairs = {name: name.removeprefix(prefix) for name in longer if name.startswith(prefix)}
        if stored_is_longer:
            text = (
                f"{count} stored names begin with `{prefix}`, which this model's do not: it was saved as a part of a larger "
                f'one. Load {{name.removeprefix("{prefix}"): value}}, or load into the larger model.'
            )
            case.rename(text, pairs)
        else:
            text = (
                f"{count} of the model's names begin with `{prefix}`, which the stored ones do not: load into that part, "
                f"model.{prefix.rstrip('.')}."
            )
            case.rename(text, {name: prefix + name for name in shorter})
        return


def _and(words: Iterable[str]) -> str:
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last
