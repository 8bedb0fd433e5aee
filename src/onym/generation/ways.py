"""The ways of decoding that can be chosen; imports no torch, so that help pages are answered at once."""

from typing import Literal

Dtype = Literal["auto", "fp32", "bf16", "int8"]
"""Of the weights: auto is bf16 where the device multiplies it in hardware, else fp32."""

Compile = Literal["auto", "on", "off"]
"""Whether a step is compiled; auto: by what was measured."""
