"""How a file and a model differ: what was compared, and the error that reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onym.errors import CheckpointError

_SHOWN = 4  # names listed of each kind; all of them are on the exception
_MOST_LINES = 20
_MOST_CAUSES = _MOST_LINES - 6  # the first line, the last, and one for each kind of difference
_WIDEST_NAME = 90

Described = Mapping[str, tuple[tuple[int, ...], str]]
"""Names with their shape and dtype; values that are no tensors have shape () and the dtype "value"."""


@dataclass(frozen=True)
class Differences:
    """What does not fit. All names are canonical; "stored" is the file's side, "model" the live one's."""

    missing: list[str] = field(default_factory=list)
    """In the model, not in the file."""
    unexpected: list[str] = field(default_factory=list)
    """In the file, not in the model."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Stored and model shape, where they differ."""
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Stored and model dtype, where they differ."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.dtypes)


@dataclass(frozen=True)
class Cause:
    """One reason why names or shapes differ, with what to do."""

    text: str
    explains: int
    """How many of the differences."""
    structural: bool = False
    """It is about the model's sizes, which a stored configuration says more exactly."""


class MismatchError(CheckpointError):
    """The stored tensors and the model do not fit.

    ``differences`` has all of the names, however many; the message has the likely causes and a few names, in 20 lines at most.
    """

    def __init__(self, differences: Differences, causes: Sequence[Cause] = ()) -> None:
        super().__init__(_message(differences, [cause.text for cause in causes]))
        self.differences = differences
        self.causes = list(causes)

    def with_configuration(self, sentence: str) -> MismatchError:
        """The same error where the file's configuration says how the model was built."""
        others = [cause for cause in self.causes if not cause.structural]
        return MismatchError(self.differences, [Cause(sentence, 0), *others])


def compare(stored: Described, model: Described) -> Differences:
    """Hold two descriptions against each other.

    >>> compare({"a": ((2,), "float32"), "b": ((2,), "float32")}, {"a": ((3,), "float32")})
    Differences(missing=[], unexpected=['b'], shapes={'a': ((2,), (3,))}, dtypes={})
    """
    both = [name for name in model if name in stored]
    return Differences(
        missing=[name for name in model if name not in stored],
        unexpected=[name for name in stored if name not in model],
        shapes={name: (stored[name][0], model[name][0]) for name in both if stored[name][0] != model[name][0]},
        dtypes={name: (stored[name][1], model[name][1]) for name in both if stored[name][1] != model[name][1]},
    )


def _message(differences: Differences, causes: list[str]) -> str:
    lines = ["The stored tensors do not fit this model; nothing was changed.", *causes[:_MOST_CAUSES]]
    for names, what in (
        (differences.missing, "in the model but not stored"),
        (differences.unexpected, "stored but not in the model"),
        (
            [f"{name} {list(was)} stored, {list(now)} in the model" for name, (was, now) in differences.shapes.items()],
            "of another shape",
        ),
        ([f"{name} {was} stored, {now} in the model" for name, (was, now) in differences.dtypes.items()], "of another dtype"),
    ):
        if names:
            lines.append(f"{len(names)} {what}: {listed(names)}.")
    assert len(lines) < _MOST_LINES
    return "\n".join(lines)


def listed(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(map(clip, names[:_SHOWN])) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def clip(name: str) -> str:
    """A name of any length, short enough to be read."""
    return name if len(name) <= _WIDEST_NAME else f"{name[: _WIDEST_NAME // 2]}…{name[-_WIDEST_NAME // 2 :]}"
