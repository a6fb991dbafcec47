"""Channels of a Mamba-1 and heads of a Mamba-2: structured Optimal Brain Surgeon on out_proj."""
