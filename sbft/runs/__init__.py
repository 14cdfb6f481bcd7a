"""What knows a recipe: how a run is built, prepared, recorded, and told as a whole in `run_recipe`."""
