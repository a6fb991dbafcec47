"""How models are built around their mixers: a stack of mixers, hybrids with other blocks, experts in their files."""
