"""From text to samples, and where hidden states are while layers are pruned; nothing of pruning."""
