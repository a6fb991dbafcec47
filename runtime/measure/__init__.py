"""Measurements: timing, latency tables, memory, perplexity. Reports stand above, in bench and evaluation."""
