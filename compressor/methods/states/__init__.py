"""States: scores, the sums they look at, elimination and repair; and single entries of A_log."""
