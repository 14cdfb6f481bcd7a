"""What can be told from a recipe before training: signs that the run will go wrong, its length and its memory."""
