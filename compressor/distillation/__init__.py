"""Distillation: the dense model teaches what is left of it, on text without labels, all layers at once."""
