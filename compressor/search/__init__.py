"""A goal in place of a sparsity: measure, list candidates, try them, take the best."""
