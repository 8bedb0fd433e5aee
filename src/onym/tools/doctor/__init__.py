"""What this machine can do, what settings suit it, and what is wrong with it."""
