"""States: importance scores, streaming statistics, elimination with repair."""
