"""Files of peft's ``save_pretrained``: an adapter alone, whose names lack the adapter's name that the model has in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def adapter_names(names: Iterable[str], adapters: Collection[str]) -> dict[str, str]:
    """What peft calls the tensors of an adapter in its file -> what they are called in the model.

    Args:
        names: all names of the model.
        adapters: the names that are asked for.

    >>> adapter_names(["q.base_layer.weight", "q.lora_A.default.weight", "norm.modules_to_save.default.bias"], ["default"])
    {'q.lora_A.weight': 'q.lora_A.default.weight', 'norm.bias': 'norm.modules_to_save.default.bias'}
    """
    found = {}
    for name in names:
        segments = name.split(".")
        for at, segment in enumerate(segments[1:], 1):
            if segment in adapters:
                before = segments[: at - 1] if segments[at - 1] == "modules_to_save" else segments[:at]
                after = [] if segments[at - 1] == "lora_magnitude_vector" else segments[at + 1 :]
                found[".".join([*before, *after])] = name
                break
    return found
