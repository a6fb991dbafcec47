"""The residual stream of the whole model, rotated and cut: d_model."""
