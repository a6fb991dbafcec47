"""Load, run and measure state-space models; knows nothing of pruning."""
