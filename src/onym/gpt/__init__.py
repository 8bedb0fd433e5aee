"""The GPT and its configuration. Knows nothing of files, data or training."""
