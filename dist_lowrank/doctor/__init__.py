"""Checks of the environment, on one node and across nodes, each with its remedy. Nothing here imports torch at once."""
