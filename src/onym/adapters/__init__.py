"""Adapters: small matrices that are trained beside a frozen model (LoRA), and the files that hold them alone."""
