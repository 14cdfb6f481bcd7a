"""The module of the metric exact_match."""
