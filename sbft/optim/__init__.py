"""Optimizers for small batches; usable alone, with plain PyTorch."""

from sbft.optim.adafactor import Adafactor
from sbft.optim.adamw import AdamW
from sbft.optim.base import TokenOptimizer
from sbft.optim.release import GradientRelease
from sbft.optim.sgd import SGD

__all__ = ["SGD", "Adafactor", "AdamW", "GradientRelease", "TokenOptimizer"]
