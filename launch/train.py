"""Pre-trains under torchrun: `torchrun --nproc-per-node 2 launch/train.py [overrides]`.

Started plainly, it does what `dist-lowrank train [overrides]` does.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from dist_lowrank.worker import main_torchrun

        main_torchrun(sys.argv[1:])
    else:
        from dist_lowrank.cli import main

        sys.exit(main(["train", *sys.argv[1:]]))
