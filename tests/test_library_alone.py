"""The library serves a stranger's model without Onym's GPT, data and trainer."""

from __future__ import annotations

from collections.abc import Callable

STRANGER = """
import sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        rooms = ("gpt", "data", "generation", "compile", "train", "tools", "cli")
        if name.split(".")[:2] in [["onym", room] for room in rooms]:
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())

import warnings
from dataclasses import dataclass

import torch
from torch import nn

import onym
from onym.convert.mapping import same
from onym.convert.registry import Format, Target
from onym.convert.write import convert


@dataclass(frozen=True)
class Sizes:
    width: int = 4


class Net(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.config = sizes
        self.inner = nn.Linear(sizes.width, sizes.width)
        self.norm = nn.BatchNorm1d(sizes.width)

    def forward(self, x):
        return self.norm(self.inner(x))


def equal(one, other):
    one, other = onym.state_dict(one), onym.state_dict(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


net = Net(Sizes(8))
optimizer = torch.optim.AdamW(net.parameters())
compiled = torch.compile(net)
net(torch.randn(3, 8)).square().sum().backward()
optimizer.step()

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    onym.save(compiled, "weights.safetensors")
assert ["model family 'gpt'" in str(warning.message) for warning in seen] == [True], "said once, and nothing else is lost"

into = Net(Sizes(8))
print(onym.load("weights.safetensors", into=into))
assert equal(net, into)

try:
    onym.load("weights.safetensors", into=Net(Sizes(4)))
except onym.MismatchError as error:
    assert "n_layers" not in str(error) and "emb_dim" not in str(error), error
else:
    raise AssertionError("it does not fit")

onym.register_architecture("net", Net, Sizes)
onym.save(compiled, "folder")
assert equal(net, onym.load_model("folder"))

with onym.Checkpointer("run", background=True) as checkpointer:
    checkpointer.save(1, {"model": compiled, "optimizer": optimizer, "note": "x"})
other = Net(Sizes(8))
restored = onym.Checkpointer("run").restore({"model": torch.compile(other), "optimizer": torch.optim.AdamW(other.parameters())})
assert (restored.step, restored.values["note"]) == (1, "x") and equal(net, other)

onym.register_format(
    Format(
        "old-net",
        "the old Net",
        lambda named: "net.w" if "net.w" in named.shapes else None,
        architecture="net",
        rules=(same("net.w", "inner.weight"), same("net.b", "inner.bias"), *(same(f"bn.{n}", f"norm.{n}") for n in (
            "weight", "bias", "running_mean", "running_var", "num_batches_tracked"))),
        config=lambda named: {"width": named.shapes["net.w"][0]},
        target=Target(),
    )
)
print(convert("folder", "old.pth", to="old-net").to)
assert equal(net, onym.load_model("old.pth"))
print(sorted(name for name in sys.modules if name.startswith("onym.gpt")))
"""


def test_a_strangers_model_is_saved_loaded_restored_and_converted(in_fresh_process: Callable[[str], str]) -> None:
    assert in_fresh_process(STRANGER).splitlines() == ["7 tensors loaded", "old-net", "[]"]
