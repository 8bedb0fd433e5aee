"""``onym classify``: the label of each text, one a line in and one a line out."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from onym.cli.arguments import ClassifyArguments
from onym.cli.report import as_step, stated_settings
from onym.cli.standard_input import lines_of_input
from onym.generation.classifying import classify
from onym.generation.opening import find_model
from onym.train.precision import choose_compute
from onym.units import plural


def run(given: ClassifyArguments) -> int:
    """``onym classify``."""
    found = find_model(
        given.model,
        step=as_step(given.step),
        part=given.part,
        settings=stated_settings(given),
        tokenizer=given.tokenizer,
        note=_note,
    )
    model = found.load(choose_compute(given.device, "fp32").device, classifier=True).model
    texts = list(given.text) or (line for line in lines_of_input() if line.strip())
    cut = 0
    for text in classify(model, found.tokenizer, texts):
        cut += text.cut
        if given.json:
            print(json.dumps(asdict(text), ensure_ascii=False), flush=True)
        else:
            print(f"{text.label}\t{text.probabilities[text.label]:.4f}", flush=True)
    if cut:
        _note(f"{plural(cut, 'text')} longer than the context of {model.config.context_length} tokens: the beginning was read.")
    return 0


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
