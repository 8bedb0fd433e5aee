"""What is kept: live objects <-> named tensors and plain JSON values."""
