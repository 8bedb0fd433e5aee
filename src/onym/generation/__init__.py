"""Text out: sampling with a KV cache."""
