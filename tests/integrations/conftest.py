"""What the tests under other trainers share."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    """Accelerate keeps what its first user in a process asked for, as that models are compiled, for all that come after."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
