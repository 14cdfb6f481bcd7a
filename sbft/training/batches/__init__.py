"""Batches as the trainer sees them: how much each holds, how large each is, and whether packed documents stay apart."""
