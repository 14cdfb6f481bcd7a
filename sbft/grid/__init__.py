"""Weights stored as integer codes with one scale per block: formats, storage, and updates that round without bias."""
