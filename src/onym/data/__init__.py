"""Corpus -> tokenizer -> token file -> batches in an exact order. Knows nothing of models, training or checkpoints."""
