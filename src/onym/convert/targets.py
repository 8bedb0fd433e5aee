"""What a checkpoint can be written as: the target that is asked for or that a name ends in, and what each takes and refuses."""

from __future__ import annotations

from pathlib import Path

from onym.convert.registry import Format, formats, targets
from onym.errors import CheckpointError, ConfigError, nearest
from onym.format.pth import PICKLES
from onym.format.reader import Checkpoint
from onym.storage.paths import NO_MODELS, ending

_ENDINGS_OF_PICKLES = (*PICKLES, ".ckpt")


def format_named(name: str, checkpoint: Checkpoint | None = None) -> Format | None:
    """The format that ``--to`` names; of several of one program, the one that holds the checkpoint's model."""
    named = [known for known in formats() if known.target is not None and name in (known.name, known.program)]
    if checkpoint is not None:
        config = checkpoint.config
        named.sort(key=lambda known: known.architecture != checkpoint.architecture)  # its own first
        for known in named:
            if known.architecture != checkpoint.architecture or config is None:
                break
            if known.target is not None and known.target.refuses(config) is None:
                return known
    return named[0] if named else None


def of_one_program(source: Format | None, target: Format | None) -> bool:
    """Whether the texts beside the weights have the same form."""
    return source is not None and target is not None and (source.program or source.name) == (target.program or target.name)


def container_of(target: str) -> str:
    """``pth``, ``folder`` or ``file``."""
    known = format_named(target)
    return known.target.container if known is not None and known.target is not None else "pth" if target == "pth" else "folder"


def choose_target(to: str | None, path: Path, checkpoint: Checkpoint) -> tuple[str, str]:
    known, kind = targets(), ending(path)
    if to is not None:
        if to not in known:
            raise ConfigError(f"There is no format {to!r}{nearest(to, known)}; there are {', '.join(known)}.")
        if container_of(to) == "pth" and kind not in _ENDINGS_OF_PICKLES:
            raise ConfigError(f"{to} is a file of torch.save: end '{path}' in .pth or .pt.")
        if format_named(to) is not None and container_of(to) == "folder" and kind in (*_ENDINGS_OF_PICKLES, ".safetensors"):
            raise ConfigError(f"{to} is a folder: leave the ending of '{path}' away.")
        wanted = _ending(to)
        if wanted and kind != wanted:
            raise ConfigError(f"{to} is one file: end '{path}' in {wanted}.")
        if to == "safetensors" and kind in _ENDINGS_OF_PICKLES:
            raise ConfigError(f"'{path}' would be a .safetensors file of another name: end it in .safetensors.")
        return to, ""
    if kind == ".safetensors":
        return "safetensors", "it ends in .safetensors"
    for known_format in formats():
        if kind and known_format.target is not None and kind == known_format.target.ending:
            return known_format.program or known_format.name, f"it ends in {kind}"
    if kind == ".bin" or kind.endswith(NO_MODELS):
        raise ConfigError(f"'{kind}' does not say which format is wanted: give --to, one of {', '.join(known)}.")
    if kind in PICKLES:
        return "pth", f"it ends in {kind}"
    if checkpoint.architecture is not None and checkpoint.config is not None:
        return "onym", "it is a folder, and the model's architecture is known"
    return "safetensors", "it is a folder"


def _ending(target: str) -> str:
    """How the name of a file must end, for a format that says so."""
    known = format_named(target)
    return known.target.ending if known is not None and known.target is not None else ""


def require_used(target: str, path: Path, shard_bytes: int | None, tokenizer: str | None, dtype: str | None) -> None:
    """Refuse options that would have no effect."""
    known = format_named(target)
    dtypes = known.target.dtypes if known is not None and known.target is not None else ()
    if dtype is not None and not dtypes:
        raise ConfigError(
            f"{target} leaves every value as it is: leave --dtype {dtype} out, or choose --to gguf, which rounds."
        )
    if dtype is not None and dtype not in dtypes:
        raise ConfigError(f"{target} has no dtype {dtype!r}{nearest(dtype, dtypes)}; --dtype is one of {', '.join(dtypes)}.")
    folder = container_of(target) == "folder"
    if shard_bytes is not None and (not folder or target == "onym"):
        raise ConfigError(f"{target} is one file: leave --shard-size out, or choose --to huggingface or safetensors.")
    if shard_bytes is not None and path.suffix == ".safetensors":
        raise ConfigError(f"Shards are files in a folder: leave the ending of '{path}' away, or --shard-size out.")
    holds = folder or container_of(target) == "file"
    if tokenizer is not None and (not holds or target == "safetensors" or path.suffix == ".safetensors"):
        raise ConfigError(
            f"{target} has no place for a tokenizer: leave --tokenizer out, or write a .gguf, or a folder of huggingface or "
            "onym."
        )


def require_architecture(checkpoint: Checkpoint, target: str) -> None:
    """Refuse what cannot be written in a format of its architecture."""
    known, origin = format_named(target, checkpoint), checkpoint.origin
    if checkpoint.config is not None and (known is None or known.architecture == checkpoint.architecture):
        refused = known.target.refuses(checkpoint.config) if known is not None and known.target is not None else None
        if refused is not None:
            raise CheckpointError(
                f"'{checkpoint.path}' cannot be written as {target}, which cannot hold this model: {refused}."
            )
        return
    if origin is not None and origin.problem is not None:
        raise CheckpointError(origin.problem)
    if origin is not None and origin.not_ours is not None:
        raise CheckpointError(
            f"'{checkpoint.path}' is {origin.kind}, which cannot be written as {target}: "
            f"{origin.not_ours}. --to safetensors and --to pth write its tensors as they are."
        )
    what = (known.architecture if known is not None else None) or "model"
    raise CheckpointError(
        f"'{checkpoint.path}' is not a {what} that is known here, so it cannot be written as {target}: --to safetensors "
        "and --to pth write its tensors as they are, under clean names."
    )
