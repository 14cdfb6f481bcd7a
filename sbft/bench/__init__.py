"""Comparing runs: tables and pictures made from their records."""
