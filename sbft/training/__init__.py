"""Training: the arguments, the trainer, its loss, and the story of one run."""
