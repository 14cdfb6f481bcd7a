"""Exports trained models in the formats of other tools."""
