"""What modules store of their own making: what is written opens again, and what nobody could open is refused at saving."""

from __future__ import annotations

import collections
import enum
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import onym
from onym.errors import CheckpointError


class Colour(enum.Enum):
    RED = 1


class Making(nn.Module):
    """A module with something of its own making in its state."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.line, self.value = nn.Linear(1, 1), value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (io.BytesIO(b"scales"), "_extra_state is a BytesIO"),
        ({"deep": [1, np.zeros(3)]}, r"_extra_state\.deep\.1 is a ndarray"),
        ({"scale": np.float64(0.5)}, "_extra_state is a dict, which torch.load"),
        (Path("x"), "_extra_state is a PosixPath"),
        ((Colour.RED,), r"_extra_state\.0 is a Colour"),
        (collections.deque([1]), "_extra_state is a deque"),
        (threading.Lock(), "_extra_state is a lock"),
    ],
)
def test_what_nobody_could_open_is_not_written(value: Any, says: str, tmp_path: Path) -> None:
    for name in ("m.pth", "m.safetensors", "m"):
        with pytest.raises(CheckpointError, match=says if name == "m.pth" else "_extra_state"):
            onym.save(nn.Sequential(Making(value)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_opens(tmp_path: Path) -> None:
    value = {"amax": torch.ones(3), "history": [1, 2.5, None, ("a", True)], "kept": collections.OrderedDict(x=b"bytes")}
    onym.save(Making(value), tmp_path / "m.pth")
    assert torch.load(tmp_path / "m.pth", weights_only=True)["_extra_state"]["history"] == value["history"]
    fresh = Making(None)
    onym.load(tmp_path / "m.pth", into=fresh)
    assert torch.equal(fresh.value.pop("amax"), torch.ones(3))
    assert fresh.value == {"history": value["history"], "kept": value["kept"]}
