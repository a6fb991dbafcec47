"""Models: families, checkpoints, tokenizers, generation."""
