"""What memory is held for: the names of all causes, and which of them are the optimizer's state."""

from __future__ import annotations

# In the order in which they are shown. A figure of a rank has a fixed place in what ranks tell each other, so a name
# that is logged has to be here.
CAUSES = (
    "parameters",
    "master_weights",
    "gradients",
    "moments",
    "dense_moments",
    "indices",
    "projection",
    "shared_dictionary",
    "error_feedback",
    "dictionary",
    "other_state",
    "gathered_parameters",
    "activations",
    "temporaries",
    "inputs",
    "refresh_workspace",
    "collective_buffers",
    "fragmentation",
    "outside_allocator",
    "residual",
    "allocator_peak",
)
# What a rank holds besides the optimizer's state, and figures of the allocator, which are no causes. A cause that is
# not known here counts as state: an assertion about state then fails rather than holds wrongly.
_NOT_STATE = (
    *("param", "gathered_param", "master_weights", "grad", "activation", "temporar", "input"),
    *("collective", "refresh_workspace", "residual"),
)
_NOT_CAUSES = ("allocator", "outside_allocator", "fragmentation", "unexplained")


def is_cause(name: str) -> bool:
    """Whether bytes of this name add up with the others to what a rank holds."""
    return not name.startswith(_NOT_CAUSES)


def is_state(name: str) -> bool:
    """Whether a cause is part of what the optimizer holds between steps."""
    return is_cause(name) and not name.startswith(_NOT_STATE)
