"""What a message tells people to do exists: each option that one names is an option of something they can call or type."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

import onym
from onym.cli.completion import completion_script
from onym.format.writer import write_safetensors

SOURCE = Path(onym.__file__).parent

THEIRS: dict[str, Callable[..., object]] = {  # options of functions that are not ours, with what has them
    "weights_only": torch.load,
    "device": nn.Module.to_empty,
    "persistent": nn.Module.register_buffer,
    "flatten_state_dict": DefaultSavePlanner,
    "plugins": lightning.pytorch.Trainer,
    "callbacks": lightning.pytorch.Trainer,
}
DCP = {"checkpoint_id", "use_collectives"}  # of dcp.save, checked below
NOT_OURS = re.compile(r"(pip install|docker run|srun|container with|xcode-select|train\.py|\bgit\b)[^.;]*$")
NO_MESSAGES = {  # arguments of git, a compiler, tyro; Prometheus' format
    *("format/provenance.py", "compile/cache_key.py", "cli/completion.py", "serve/metrics.py"),
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The texts in a module that somebody may be shown: every string but docstrings; what is filled in is ``{}``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unshown: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):  # also what stands below a field
            unshown.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            unshown.update(id(part) for part in ast.walk(node) if part is not node)
    for node in ast.walk(tree):
        if id(node) in unshown:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)


def shown() -> Iterator[tuple[str, str]]:
    """Each text, with its place."""
    for path in sorted(SOURCE.rglob("*.py")):
        if (name := path.relative_to(SOURCE).as_posix()) not in NO_MESSAGES:
            yield from ((f"{name}:{line}", text) for line, text in texts(path))


def public_options() -> set[str]:
    """The names of the parameters of everything in ``onym``, and of the methods of its classes."""
    found: set[str] = set()
    for name in onym.__all__:
        thing = getattr(onym, name)
        own = vars(thing).items() if inspect.isclass(thing) else ()
        methods = [getattr(thing, name) for name, each in own if inspect.isfunction(each) or isinstance(each, classmethod)]
        for each in (thing, *methods):
            with contextlib.suppress(TypeError, ValueError):  # a type without a signature
                found.update(inspect.signature(each).parameters)
    return found


def test_each_keyword_that_a_message_names_is_one_of_a_public_function() -> None:
    known = public_options() | THEIRS.keys() | DCP
    named = {
        (where, name) for where, text in shown() for name in re.findall(r"(?<![\w.-])([a-z_]\w*)=(?![=\s]*\{\}[;:])", text)
    }
    assert len(named) > 20
    assert "\n".join(sorted(f"{where}: {name}=" for where, name in named if name not in known)) == ""


def test_what_is_not_ours_has_its_options() -> None:
    for name, call in THEIRS.items():
        assert name in inspect.signature(call).parameters
    for name in DCP:
        assert name in inspect.signature(save).parameters


@pytest.mark.parametrize("call", [onym.load, onym.load_state_dict, onym.Checkpointer.restore])
def test_what_a_mismatch_advises_is_an_option_of_each_call_that_may_raise_one(call: Callable[..., object]) -> None:
    places = ("names/", "state/model.py", "state/patterns.py", "state/optimizer.py")
    named = {
        name
        for where, text in shown()
        if where.startswith(places)
        for name in re.findall(r"(?<![\w.(-])(strict|dtype|accept|skip_mismatched|verify|rng)=", text)
    }
    assert {"strict", "dtype", "accept", "skip_mismatched"} <= named
    has = set(inspect.signature(call).parameters)
    assert named - has <= ({"accept"} if call is not onym.Checkpointer.restore else set())  # an optimizer's alone
    assert "accept" in inspect.signature(onym.load_optimizer_state).parameters


def test_load_model_says_which_call_has_the_options_that_a_mismatch_advises(tmp_path: Path) -> None:
    config = onym.GPTConfig.preset("nano", vocab_size=100)
    weights = dict(list(onym.GPT(config).state_dict().items())[:-1])
    write_safetensors(tmp_path / "m.safetensors", weights, "gpt", dataclasses.asdict(config))
    with pytest.raises(onym.MismatchError, match=r"onym\.load\(path, into=model\), which has strict=False"):
        onym.load_model(tmp_path / "m.safetensors")


def test_each_option_that_a_message_names_is_one_of_a_command() -> None:
    known = set(re.findall(r"--[a-z][a-z0-9-]*", completion_script("bash"))) | {"--help", "--version", "--install-completion"}
    named = {
        (where, found.group())
        for where, text in shown()
        for found in re.finditer(r"(?<![\w-])--[a-z][\w-]*", text)
        if not NOT_OURS.search(text[: found.start()]) and text != "--keep"  # the beginning of several, in a table
    }
    assert len(named) > 100
    assert "\n".join(sorted(f"{where}: {option}" for where, option in named if option not in known)) == ""
