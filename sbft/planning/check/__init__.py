"""What a recipe shows before anything is trained: each known sign of a run that goes wrong, its length and its memory."""
