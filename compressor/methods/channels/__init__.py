"""Channels of a Mamba-1, heads of a Mamba-2, and the fit of out_proj."""
