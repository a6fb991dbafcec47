"""Gradient steps on each pruned layer, `--refine`."""
