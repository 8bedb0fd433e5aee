"""A mismatch under diagnosis: what is not explained yet, and the causes found so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onym.names.hints import Size, field_of
from onym.names.mismatch import Cause, Described, Differences, compare


class Case:
    """The differences that are not explained yet, and the causes found so far."""

    def __init__(self, differences: Differences, stored: Described, model: Described) -> None:
        self.all, self.stored, self.model = differences, dict(stored), model
        self.causes: list[Cause] = []
        self._take(differences)

    def _take(self, differences: Differences) -> None:
        self.missing, self.unexpected = dict.fromkeys(differences.missing), dict.fromkeys(differences.unexpected)
        self.shapes, self.dtypes = dict(differences.shapes), dict(differences.dtypes)

    def found(self, text: str, names: Iterable[str], *, structural: bool = False) -> None:
        """Add a cause that explains these names."""
        explained = set(names)
        self.causes.append(Cause(text, len(explained), structural))
        for name in explained:
            self.missing.pop(name, None)
            self.unexpected.pop(name, None)
            self.shapes.pop(name, None)

    def rename(self, text: str, renames: Mapping[str, str]) -> None:
        """Add a cause that other names explain, and continue as if the file had the model's names."""
        self.causes.append(Cause(text, len(renames)))
        self.stored = {renames.get(name, name): value for name, value in self.stored.items()}
        again = compare(self.stored, self.model)
        keep = set(self.missing), {renames.get(name, name) for name in self.unexpected}
        self._take(
            Differences(
                [name for name in again.missing if name in keep[0]],
                [name for name in again.unexpected if name in keep[1]],
                again.shapes,
                again.dtypes if self.all.dtypes or not self.all.shapes else {},
            )
        )

    def build_with(self, size: Size, value: object) -> str:
        """The remedy: ``build it with n_layers=12`` where a model family says what it calls this size."""
        field = field_of(size, self.model)
        return f"build it with {field}={value}" if field is not None else f"build it with {_WORDS[size].format(value)}"


_WORDS: dict[Size, str] = {
    "blocks": "{} blocks",
    "vocabulary": "a vocabulary of {}",
    "context": "a context of {}",
    "width": "a width of {}",
    "qkv_bias": "the same biases",
    "bias": "the same biases",
}
