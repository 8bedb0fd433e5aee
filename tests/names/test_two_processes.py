"""Names and values with two real processes: DDP and FSDP2 over gloo, against the plain model in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Runs on both ranks. Whatever differs between them, or from the plain model, ends the process with an error.
PROGRAM = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
import onym
from onym.state.optimizer import load_optimizer_state, optimizer_state
from onym.state.dtensor import full_tensor

kind, folder = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
config = onym.GPTConfig(vocab_size=64, context_length=16, emb_dim=32, n_heads=2, n_layers=2, tie_embeddings=True)
batch = lambda step, rank: torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(10 * step + rank))

def plain(seed=0):
    torch.manual_seed(seed)
    return onym.GPT(config)

def wrapped(seed=0):
    model = plain(seed)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))
    if kind == "compile-ddp":
        return torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
    for index, block in enumerate(model.trf_blocks):
        block.compile(backend="eager")
        fully_shard(block)
    fully_shard(model)
    return torch.compile(model, backend="eager") if kind == "compile-fsdp" else model

def optimizer_of(model):
    parameters = list(model.parameters())
    return torch.optim.AdamW([{"params": parameters[:3], "lr": 0.02}, {"params": parameters[3:], "lr": 0.01}])

def step(model, optimizer, number):
    tokens = batch(number, rank)
    with torch.compiler.set_stance("force_eager"):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()

def full(state):
    return {name: full_tensor(value).clone() for name, value in state.items()}

def same(first, second, tolerance=0.0):
    assert list(first) == list(second), (list(first), list(second))
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=tolerance, atol=tolerance), name

model = wrapped()
same(full(onym.state_dict(model)), plain().state_dict())
optimizer = optimizer_of(model)
for number in range(3):
    step(model, optimizer, number)
kept = full(onym.state_dict(model))
tensors, description = optimizer_state(model, optimizer)
tensors = full(tensors)
step(model, optimizer, 3)

# Into the same kind, built otherwise: the next step is the same to the last bit.
again = wrapped(seed=1)
other = torch.optim.AdamW([{"params": [p]} for p in reversed(list(again.parameters()))])
onym.load_state_dict(again, kept)
load_optimizer_state(again, other, tensors, description)
step(again, other, 3)
same(full(onym.state_dict(again)), full(onym.state_dict(model)))
assert onym.unwrap(again).out_head.weight is onym.unwrap(again).tok_emb.weight

# Into a plain model in each process, trained on both ranks' batches.
bare = plain(seed=2)
single = optimizer_of(bare)
onym.load_state_dict(bare, kept)
load_optimizer_state(bare, single, tensors, description)
losses = [bare(tokens[:, :-1], tokens[:, 1:]) for tokens in (batch(3, 0), batch(3, 1))]
(sum(losses) / 2).backward()
single.step()
same(dict(bare.state_dict()), full(onym.state_dict(model)), 1e-4)

# From sharded straight into plain and back, and through a file that one process wrote.
onym.load_state_dict(bare, onym.state_dict(model))
same(dict(bare.state_dict()), full(onym.state_dict(model)))
onym.load_state_dict(again, bare.state_dict())
same(full(onym.state_dict(again)), dict(bare.state_dict()))
onym.save(model, f"{folder}/{kind}.safetensors")
dist.barrier()
same(dict(onym.load_model(f"{folder}/{kind}.safetensors").state_dict()), dict(bare.state_dict()))
try:
    onym.load_state_dict(again, {**kept, "out_head.weight": kept["out_head.weight"] + 1})
except onym.OnymError as error:
    assert "one tensor in this model" in str(error)
else:
    raise AssertionError("contradicting ties were taken")
dist.barrier()
dist.destroy_process_group()
print("right")
"""


@pytest.mark.parametrize("kind", ["ddp", "compile-ddp", "fsdp", "compile-fsdp"])
def test_two_processes_have_the_plain_models_names_and_values(kind: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "program.py"), kind, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("right") == 2
