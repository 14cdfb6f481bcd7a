"""The peak memory of a run, predicted without its weights."""
