"""How a recipe becomes a run. `run_recipe` tells the whole story; every other module is one part of it."""
