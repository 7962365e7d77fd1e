"""Memory and traffic of a run, told before anything is launched."""
