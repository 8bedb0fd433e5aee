"""What helps before and after a run: this machine's settings, the ladder of techniques, the proof of exact resume."""
