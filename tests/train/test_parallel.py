"""A model that gets its values block after block, and norms whose weights are all-gathered in bf16."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from onym import GPT, GPTConfig
from onym.train.parallel import UpcastLayerNorm, materialise


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"bias": True, "qkv_bias": True}])
def test_made_block_after_block_it_begins_the_same(changes: dict[str, bool]) -> None:
    """With the same weights as one that is made at once, the same generator afterwards, and no two blocks without a share."""
    config = GPTConfig.preset("nano", vocab_size=70, **changes)
    torch.manual_seed(5)
    at_once, then = GPT(config), torch.rand(1)
    torch.manual_seed(5)
    model, others = GPT.without_values(config), []

    def look(block: torch.nn.Module) -> None:
        others.append([any(p.is_meta for p in each.parameters()) for each in model.trf_blocks])

    materialise(model, look)
    assert torch.equal(torch.rand(1), then)
    state = at_once.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.out_head.weight is model.tok_emb.weight) == config.tie_embeddings
    layers = len(model.trf_blocks)
    assert others == [[other > number for other in range(layers)] for number in range(layers)]


def test_a_norm_rounds_nothing_that_is_wider() -> None:
    """Its weights may be narrower than what comes in, or wider, as in a model in bf16 whose norms are fp32."""
    norm = UpcastLayerNorm(64)
    torch.nn.init.normal_(norm.weight, 1)
    x = torch.randn(3, 64)
    expected = F.layer_norm(x, (64,), norm.weight, norm.bias)
    assert torch.equal(norm(x), expected)
    assert torch.equal(norm(x.bfloat16()), F.layer_norm(x.bfloat16(), (64,), norm.weight, norm.bias))
    rounded = norm.weight.bfloat16().float()
    assert torch.equal(norm.bfloat16()(x), F.layer_norm(x, (64,), rounded, norm.bias.float()))
