"""What knows a `Trainer`: its arguments, steps, loss and checkpoints, and the watch over a run."""
