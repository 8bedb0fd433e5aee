"""What people call the model's part of a state that holds several things."""

from __future__ import annotations

MODEL_KEYS = ("model", "model_state_dict", "state_dict", "module", "net", "network", "model_state", "weights", "params")
"""Most telling first."""
