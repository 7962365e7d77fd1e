"""`python -m dist_lowrank.sweep.point PARENT OVERRIDES...`: `dist-lowrank train`, but ended with the sweep it is of."""

from __future__ import annotations

import sys

from dist_lowrank.cli import main
from dist_lowrank.worker import end_with_parent, leave

if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    leave(main(["train", *sys.argv[2:]]))
