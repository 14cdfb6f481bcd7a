"""Checkpoints: what is in a run's folder, how it is written, and what could keep it from being written."""
