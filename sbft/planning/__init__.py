"""Predictions before a run starts: its peak memory, its best batch size, and what is wrong with its recipe."""
