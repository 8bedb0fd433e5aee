"""The loop and what it needs: options, precision, compilation, optimizer, evaluation, display, proof."""
