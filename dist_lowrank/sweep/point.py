"""`python -m dist_lowrank.sweep.point PARENT OVERRIDES...`: `dist-lowrank train`, but ended with the sweep it is of."""

from __future__ import annotations

import os
import sys

from dist_lowrank.cli import main
from dist_lowrank.worker import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    if os.getppid() != int(sys.argv[1]):  # the sweep was gone before
        sys.exit(1)
    sys.exit(main(["train", *sys.argv[2:]]))
