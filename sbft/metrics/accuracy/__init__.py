"""The module of the metric accuracy."""
