"""The advice for weights that are computed from others is right: followed to the letter, it gives the same outputs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import onym
from onym import MismatchError


def pruned(layer: nn.Module, name: str = "weight") -> nn.Module:
    return prune.random_unstructured(layer, name, amount=0.5)  # type: ignore[no-any-return, no-untyped-call]


FORMS: dict[str, Callable[..., nn.Module]] = {
    "weight_norm, old": weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm, old": spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruning": pruned,
}


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def advice(model: nn.Module, state: dict[str, torch.Tensor]) -> str:
    with pytest.raises(MismatchError) as caught:
        onym.load_state_dict(model, state)
    assert "rename" not in str(caught.value)
    return caught.value.causes[0].text


def follow(call: str, model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            eval(call, {"torch": torch, "layer": layer})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_a_stored_form_loads_as_advised(form: str) -> None:
    trained, batch = plain(), torch.randn(5, 3)
    for layer in (trained[0], trained[2]):
        FORMS[form](layer)
    trained.train()(batch)  # spectral_norm updates its vectors
    expected = trained.eval()(batch)
    model = plain()
    text = advice(model, trained.state_dict())
    said = re.search(r"Stored with (\S+) \(0\.weight is computed .*: call (\S+\(.*?\)) for .*, and then (\S+\(.*?\)) if", text)
    assert said is not None, text
    assert said[1] == form.partition(",")[0]
    follow(said[2], model)
    onym.load_state_dict(model, trained.state_dict())
    assert torch.equal(model(batch), expected)
    follow(said[3], model)
    assert sorted(model.state_dict()) == sorted(plain().state_dict())
    assert torch.allclose(model(batch), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_the_model_is_added_after_loading(form: str) -> None:
    trained, batch = plain(), torch.randn(5, 3)
    model = plain()
    for layer in (model[0], model[2]):
        FORMS[form](layer)
    text = advice(model, trained.state_dict())
    assert re.search(r"This model has \S+ \(0\.weight is computed .*, the file has the plain weight: load first", text), text
    again = plain()
    onym.load_state_dict(again, copy.deepcopy(trained.state_dict()))
    assert torch.equal(again(batch), trained(batch))


def test_a_parametrisation_of_any_kind_is_named() -> None:
    trained = plain()
    parametrizations.orthogonal(trained[0])
    assert "a parametrisation (0.weight is computed from 0.parametrizations.weight.original" in advice(
        plain(), trained.state_dict()
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_the_weight_is_named_in_the_call(form: str) -> None:
    """A recurrent layer has several weights, none of them called ``weight``."""
    trained, model = nn.GRU(3, 4).eval(), nn.GRU(3, 4).eval()
    FORMS[form](trained, "weight_hh_l0")
    text = advice(model, trained.state_dict())
    call = re.search(r": call (\S+\(layer, 'weight_hh_l0'\)) for", text)
    assert call is not None, text
    eval(call[1], {"torch": torch, "layer": model})
    onym.load_state_dict(model, trained.state_dict())
    batch = torch.randn(2, 1, 3)
    assert torch.equal(model(batch)[0], trained(batch)[0])
