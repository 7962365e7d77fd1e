"""Many runs from one command: the points of a grid, each a run of its own, and their comparison."""
