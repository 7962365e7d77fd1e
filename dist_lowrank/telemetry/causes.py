"""The causes of memory: names under which bytes are logged, planned, drawn and compared.

docs/memory.md says what each means and how it is obtained.
"""

from __future__ import annotations

# Exact to the byte, from the tensors themselves, at each logged step.
OF_MODEL = ("parameters", "master_weights", "gradients")
OF_OPTIMIZER = (
    *("moments", "dense_moments", "indices", "projection", "shared_dictionary", "error_feedback"),
    *("dictionary", "other_state", "diagnostics"),
)
# From the tracker, at the steps that the configuration names: the most of each at any one moment of the step.
OF_STEP = (
    *("buffers", "inputs", "activations", "temporaries", "gathered_parameters"),
    *("refresh_workspace", "collective_buffers", "checkpoint_copy"),
)
RESIDUAL = "residual"  # what was measured at the peak of such a step, less all of the above at that moment
# On a GPU, at each logged step: what torch's allocator has and does not use, and what others have of the device.
OF_ALLOCATOR = ("fragmentation", "outside_allocator")
# In the order in which they are shown. A figure of a rank has a fixed place in what ranks tell each other, so a name
# that is logged has to be here. What the allocator held at most is no cause.
CAUSES = (*OF_MODEL, *OF_OPTIMIZER, *OF_STEP, *OF_ALLOCATOR, RESIDUAL, "allocator_peak")
_NOT_STATE = {*OF_MODEL, *OF_STEP, *OF_ALLOCATOR, RESIDUAL, "allocator_peak"}
_NOT_CAUSES = {*OF_STEP, *OF_ALLOCATOR, RESIDUAL, "allocator_peak"}


def is_cause(name: str) -> bool:
    """Whether bytes of this name add up with the others to what a rank holds from step to step.

    What lives within a step is logged at its most, which is at another moment for each, and at tracked steps alone.
    """
    return name not in _NOT_CAUSES


def is_state(name: str) -> bool:
    """Whether a cause is part of what the optimizer holds between steps.

    One that is not known here counts as state: an assertion about state then fails rather than holds wrongly.
    """
    return name not in _NOT_STATE
