"""Starts the processes of a run, after everything that can be checked beforehand has been."""
