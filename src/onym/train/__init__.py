"""The loop and what it needs: options, precision, optimizer, evaluation, display, proof."""
