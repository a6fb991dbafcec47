"""Several processes that share the samples of a run."""
