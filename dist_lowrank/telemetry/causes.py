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
    *("refresh_workspace", "collective_buffers"),
)
RESIDUAL = "residual"  # what was measured at the peak of such a step, less all of the above at that moment
# On a GPU, at each logged step: what torch's allocator has and does not use, and what others have of the device.
OF_ALLOCATOR = ("fragmentation", "outside_allocator")
