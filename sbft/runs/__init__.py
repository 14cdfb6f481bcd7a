"""Runs of recipes. `run_recipe` is the whole sequence; every other module is a part of it."""
