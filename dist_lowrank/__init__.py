"""Distributed pre-training with low-rank optimizer state."""

__version__ = "0.1.0"
