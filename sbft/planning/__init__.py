"""What a run will need, found before it starts: its peak memory, its best batch size, and what is wrong with its recipe."""
