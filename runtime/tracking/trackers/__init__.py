"""A file for each tracker, with it as `TRACKER`."""
