"""What the bytes of a checkpoint mean: written completely or not at all, and verified before they are used."""
