"""The few pieces of arithmetic of a step that are worth a kernel of their own; each with a path in plain torch."""
