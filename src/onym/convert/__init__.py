"""Other people's checkpoints: what is in them, how it becomes ours, and how ours becomes theirs. One file per format."""
