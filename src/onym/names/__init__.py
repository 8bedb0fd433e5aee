"""One parameter, one name, through every wrapper."""
