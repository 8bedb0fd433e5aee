"""LoRA: a model's linear layers get small matrices beside them, which are trained alone and saved alone.

:class:`LoRA` is the adapters as a module of their own. Its parameters are the live ones, under the names that they have in the
model, so an optimizer, :func:`onym.save`, :func:`onym.load` and :class:`onym.Checkpointer` work on it as on any module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onym.adapters.layer import A, B, LoRALinear, Place, is_conv1d, linear_places, merged, tied_places
from onym.errors import CheckpointError, ConfigError, nearest
from onym.names.plain_view import plain_view
from onym.names.wrappers import require_module
from onym.state.architectures import register_architecture
from onym.state.dtensor import full_tensor, is_sharded
from onym.state.model import full_state_dict, state_dict

ARCHITECTURE = "lora"
"""What files of adapters alone are called in a manifest."""
ALL = "all"
_NEED_GRADIENTS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_SHOWN = 6


@dataclass(frozen=True)
class LoRAConfig:
    """What adapters are, beside their values: the ``config.json`` of their checkpoints."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL,)
    """As they were given to :meth:`LoRA.apply`."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Layers with another rank, by name."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Layers with another alpha, by name."""
    transposed: tuple[str, ...] = ()
    """Layers whose base weight is [in, out], as a Conv1D of transformers."""
    base: dict[str, Any] | None = None
    """The model that they belong to: ``path``, ``identity``, ``architecture`` and ``config``."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """From JSON.

        Raises:
            ConfigError: it is no such configuration.
        """
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        listed = {name: tuple(known[name]) for name in ("targets", "transposed") if isinstance(known.get(name), list)}
        try:
            config = cls(**{**known, **listed})
            for names in (config.targets, config.transposed, config.rank_pattern, config.alpha_pattern):
                if not isinstance(names, tuple | dict) or not all(isinstance(name, str) for name in names):
                    raise TypeError(f"{names!r} are no names of layers")
            if not isinstance(config.base, dict | None):
                raise TypeError(f"its base is {config.base!r}")
            for path in ("", *config.rank_pattern, *config.alpha_pattern):
                _require_numbers(config.rank_of(path), config.alpha_of(path), config.dropout)
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"This is no configuration of LoRA: {error}.") from error
        return config

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; what is as usual is left out."""
        values = asdict(self)
        values["targets"] = list(self.targets)
        values["transposed"] = list(self.transposed)
        return {name: value for name, value in values.items() if value or name in ("rank", "alpha", "dropout", "targets")}

    def rank_of(self, path: str) -> int:
        """The rank of a layer."""
        return self.rank_pattern.get(path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of a layer."""
        return self.alpha_pattern.get(path, self.alpha)

    def scaling_of(self, path: str) -> float:
        """What the product of a layer's matrices is multiplied by."""
        return self.alpha_of(path) / self.rank_of(path)

    def said_of(self, path: str) -> str:
        """In words."""
        return f"alpha {self.alpha_of(path):g} at rank {self.rank_of(path)}"

    def without_base(self) -> LoRAConfig:
        """The same of any model."""
        return replace(self, base=None)


@dataclass
class _Applied:
    """What the layers of one model have in common; each has it, so that adapters can be found in a model."""

    config: LoRAConfig
    frozen: list[str]
    """Parameters of the model that were trainable before."""


class LoRA(nn.Module):
    """The adapters of a model, alone: :meth:`LoRA.apply` makes them.

    >>> import onym
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> lora = LoRA.apply(model, rank=2)
    >>> list(lora.state_dict())
    ['0.lora_A.weight', '0.lora_B.weight', '2.lora_A.weight', '2.lora_B.weight']
    >>> optimizer = torch.optim.AdamW(lora.parameters())
    >>> onym.save(lora, "adapter/")  # a folder that peft opens too
    >>> lora.merge() is model, list(model.state_dict())
    (True, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """

    def __init__(self, model: nn.Module, places: Iterable[Place], applied: _Applied) -> None:
        super().__init__()
        # Not registered: the handle's own modules are the adapters alone, and one of them may be called "model".
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "_places", list(places))
        object.__setattr__(self, "_applied", applied)
        for place in self._places:
            container: nn.Module = self
            for segment in place.path.split("."):
                container = container._modules.setdefault(segment, nn.Module())  # type: ignore[assignment]
            assert isinstance(place.layer, LoRALinear)
            container._modules |= {"lora_A": place.layer.lora_A, "lora_B": place.layer.lora_B}

    model: nn.Module
    """The model that they are in."""
    _places: list[Place]
    _applied: _Applied

    @classmethod
    def apply(  # type: ignore[override]  # nn.Module's calls a function on each module, which nobody does with adapters
        cls,
        model: nn.Module,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: str | Iterable[str] = ALL,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> LoRA:
        """Freeze a model and give linear layers of it adapters, in place. Its outputs are the same until they are trained.

        Args:
            model: any module, plain or compiled; before DistributedDataParallel or ``fully_shard``, and after ``.to(device)``.
            rank: of the two matrices, A [rank, in] and B [out, rank]. They are in fp32 where the model is in less.
            alpha: their product is scaled by alpha / rank; twice the rank by default.
            dropout: probability that an input of A is zeroed while training.
            targets: which linear layers, by parts of their names: ``"att"``, ``"att.qkv,ff"``, ``["trf_blocks.11", "*proj"]``.
                ``"all"`` are those inside the model's parts: a linear layer that is a part of the model itself (an output head)
                or whose weight is another module's too (an embedding's) is left out; where all are parts of the model itself,
                as in an ``nn.Sequential``, all of them.
            rank_pattern, alpha_pattern: other values for single layers, by name.
            generator: draws A; torch's own by default. B begins as zeros.

        Raises:
            ConfigError: a value is out of range, a target matches nothing, or the model has adapters already, or is
                distributed already.

        >>> import onym
        >>> model = onym.GPT(onym.GPTConfig.preset("nano", vocab_size=100, n_layers=1))
        >>> lora = LoRA.apply(model, rank=4, targets="att.qkv")
        >>> {name: tuple(parameter.shape) for name, parameter in lora.named_parameters()}
        {'trf_blocks.0.att.qkv.lora_A.weight': (4, 128), 'trf_blocks.0.att.qkv.lora_B.weight': (384, 4)}
        """
        alpha = 2 * rank if alpha is None else alpha
        _require_numbers(rank, alpha, dropout)
        _require_free(model)
        listed = _as_list(targets)
        chosen = _chosen(model, listed)
        ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
        paths = [place.path for place in chosen]
        for path in (*ranks, *alphas):
            if path not in paths:
                raise ConfigError(f"No layer with an adapter is called {path!r}{nearest(path, paths)}.")
            _require_numbers(ranks.get(path, rank), alphas.get(path, alpha), dropout)
        config = LoRAConfig(rank, alpha, dropout, tuple(listed), ranks, alphas)
        return cls._put(model, chosen, config, generator)

    @classmethod
    def apply_to(cls, model: nn.Module, layers: Iterable[str], config: LoRAConfig) -> LoRA:
        """As :meth:`apply`, to the layers of these names, with what a file states."""
        _require_free(model)
        places = {path: place for place in linear_places(model) for path in place.paths}
        for layer in layers:
            if layer not in places:
                raise ConfigError(f"{layer} is no linear layer of this {type(model).__name__} that could have an adapter.")
        chosen = {id(places[layer]): places[layer] for layer in layers}
        return cls._put(model, list(chosen.values()), config)

    @classmethod
    def _put(cls, model: nn.Module, chosen: list[Place], config: LoRAConfig, generator: torch.Generator | None = None) -> LoRA:
        frozen = [name for name, parameter in plain_view(model).named_parameters() if parameter.requires_grad]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        turned = tuple(place.path for place in chosen if is_conv1d(place.layer))
        applied = _Applied(replace(config, transposed=turned), frozen)
        for place in chosen:
            rank, alpha = config.rank_of(place.path), config.alpha_of(place.path)
            layer = LoRALinear(place.layer, rank, alpha, config.dropout, generator)
            object.__setattr__(layer, "applied", applied)
            place.replace(layer)
        return cls(model, chosen, applied)

    @staticmethod
    def conv1d_layers(model: nn.Module) -> tuple[str, ...]:
        """The layers whose weight is [in, out]: a ``Conv1D`` of transformers."""
        return tuple(path for place in linear_places(model) if is_conv1d(place.layer) for path in place.paths)

    @classmethod
    def of(cls, model: nn.Module) -> LoRA | None:
        """The adapters that are in a model; None where there are none."""
        require_module(model)
        places = [place for place in linear_places(model) if isinstance(place.layer, LoRALinear)]
        return cls(model, places, places[0].layer.applied) if places else None  # type: ignore[arg-type]

    @classmethod
    def open(cls, path: str | Path, model: nn.Module) -> LoRA:
        """Give a model the adapters that a file or folder holds, with the rank, alpha and layers that it states.

        Args:
            path: a folder of ``onym.save(lora, …)`` or of peft, a run or checkpoint that holds adapters alone, or the book's.
            model: the base that they were trained on. A GPT-2, Llama or Qwen of ours takes those of transformers' classes.

        Raises:
            CheckpointError: there are none, they are of a kind that is not read here, or they belong to another model.
        """
        from onym.adapters.opening import apply_stored

        return apply_stored(path, model)

    @property
    def config(self) -> LoRAConfig:
        """Rank, alpha, dropout and targets; and the base, where it was recorded."""
        return self._applied.config

    def record_base(self, base: Mapping[str, Any]) -> None:
        """Say which model they belong to, for what is saved from now on (:func:`onym.adapters.stored.base_of`)."""
        self._applied.config = replace(self.config, base=dict(base))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the adapters to the weights and take them out, in place: the model is plain again, and computes the same.

        Its parameters are the same objects, trainable as they were before :meth:`apply`.

        Raises:
            ConfigError: the weights are sharded or quantised.
        """
        for place in self._live():
            weight = place.layer.weight
            if is_sharded(weight):
                raise ConfigError(
                    "The weights are sharded: save with onym.save(lora, path, merged=True) on every rank instead."
                )
            _require_floating(place.path, weight)
        for place in self._live():
            place.layer.weight.copy_(place.layer.merged_weight())
        return self.remove()

    def merged_state(self) -> dict[str, Any]:
        """The model's state with the adapters merged, by canonical name; the live model stays as it is.

        Of a sharded model every rank has to call; the tensors are full ones.
        """
        state, _ = full_state_dict(state_dict(self.model))
        for place in self._live():
            layer, name = place.layer, f"{place.path}.weight"
            a, b = (state.pop(f"{place.path}.{each}") for each in (A, B))
            _require_floating(place.path, state[name])
            value = merged(state[name], full_tensor(a), full_tensor(b), layer.scaling, transposed=layer.is_conv1d)
            for path in place.paths:
                state[f"{path}.weight"] = value
                for each in (A, B):
                    state.pop(f"{path}.{each}", None)
        return state

    def remove(self) -> nn.Module:
        """Take the adapters out, in place: the model is as it was before :meth:`apply`."""
        for place in self._live():
            place.restore()
        trainable = set(self._applied.frozen)
        for name, parameter in plain_view(self.model).named_parameters():
            if name in trainable:
                parameter.requires_grad_(True)
        self._places.clear()
        self._modules.clear()
        return self.model

    def extra_repr(self) -> str:
        """For print(lora)."""
        return f"rank={self.config.rank}, alpha={self.config.alpha}, of a {type(self.model).__name__}"

    def _live(self) -> list[Any]:
        """The places, of which each has its LoRALinear."""
        if not self._places:
            raise ConfigError("These adapters were merged or removed already.")
        return self._places


def _require_free(model: nn.Module) -> None:
    """Refuse what adapters cannot be put into."""
    require_module(model)
    plain_view(model)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            raise ConfigError("The model has LoRA adapters already: merge() or remove() them first, as in onym.LoRA.of(model).")
        name = next((each.__name__ for each in type(module).__mro__ if each.__name__ in _NEED_GRADIENTS), None)
        if name is not None:
            made = "fully_shard" if name == "FSDPModule" else name
            raise ConfigError(f"The model is distributed by {made} already: call onym.LoRA.apply before that.")


def _as_list(targets: str | Iterable[str]) -> list[str]:
    listed = targets.split(",") if isinstance(targets, str) else list(targets)
    if not listed or not all(isinstance(each, str) and each.strip(" .") for each in listed):
        raise ConfigError(f'targets takes parts of names, as "att,ff" or ["att.qkv"], or "all", not {targets!r}.')
    return [each.strip(" .") for each in listed]


def _chosen(model: nn.Module, targets: list[str]) -> list[Place]:
    """The layers that the targets name, each of which names one."""
    places = linear_places(model)
    if not places:
        raise ConfigError(f"The {type(model).__name__} has no linear layer inside it that could have an adapter.")
    shared = tied_places(model, places)
    free = [place for place in places if place.path not in shared]
    inside = [place for place in free if "." in place.path] or free
    chosen = {id(place) for place in inside} if ALL in targets else set()
    if ALL in targets and not chosen:
        raise ConfigError(
            f"The weight of {places[0].path} is {shared[places[0].path]} too, and there is no other linear layer that could "
            "have an adapter."
        )
    for target in targets:
        if target == ALL:
            continue
        matching = [place for place in places if any(matches(target, path) for path in place.paths)]
        if not matching:
            kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", place.path) for place in places))
            more = f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else ""
            parts = {part for kind in kinds for part in _runs(kind)}
            raise ConfigError(
                f"The target {target!r} matches no linear layer{nearest(target, parts)}; there are "
                f"{', '.join(kinds[:_SHOWN])}{more}."
            )
        if found := [place for place in matching if place.path in shared]:
            raise ConfigError(
                f"The weight of {found[0].path} is {shared[found[0].path]} too, which an adapter would not change: leave it "
                "out of the targets."
            )
        chosen |= {id(place) for place in matching}
    return [place for place in places if id(place) in chosen]


def matches(target: str, path: str) -> bool:
    """Whether a target is a run of whole segments of a path; ``*`` and ``?`` stand for any characters.

    >>> matches("att", "blocks.0.att.qkv"), matches("at", "blocks.0.att.qkv"), matches("*qkv", "blocks.0.att.qkv")
    (True, False, True)
    """
    return fnmatchcase(f".{path}.", f"*.{target}.*")


def _runs(path: str) -> Iterable[str]:
    segments = [each for each in path.split(".") if each != "*"]
    return (".".join(segments[start:end]) for start in range(len(segments)) for end in range(start + 1, len(segments) + 1))


def _require_numbers(rank: Any, alpha: Any, dropout: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"The rank of LoRA is a whole number of at least 1, not {rank!r}.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ConfigError(f"The alpha of LoRA is a number above 0, not {alpha!r}.")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(f"The dropout of LoRA is a probability from 0 to below 1, not {dropout!r}.")


def _require_floating(path: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise ConfigError(f"The weight of {path} is quantised ({weight.dtype}): merge into a base that is not.")


def _not_built(config: LoRAConfig) -> nn.Module:
    raise CheckpointError("Adapters alone are no model: open them with onym.load_model, which merges them into their base.")


register_architecture(ARCHITECTURE, LoRA, LoRAConfig, build=_not_built)
