"""Optimizers with low-rank state, for any trainer. Needs torch alone.

from dist_lowrank.optim import DCTAdamW, param_groups
optimizer = DCTAdamW(param_groups(model), lr=1e-3, rank=0.25)
"""

from dist_lowrank.optim.adafactor import Adafactor
from dist_lowrank.optim.adamw8bit import AdamW8bit
from dist_lowrank.optim.apollo import Apollo
from dist_lowrank.optim.came import CAME
from dist_lowrank.optim.dct_adamw import DCTAdamW
from dist_lowrank.optim.dion import Dion
from dist_lowrank.optim.dion3 import Dion3
from dist_lowrank.optim.fira import Fira
from dist_lowrank.optim.frugal import Frugal
from dist_lowrank.optim.galore import GaLore, GoLore
from dist_lowrank.optim.gradient_sync import sum_coefficients
from dist_lowrank.optim.grass import Grass
from dist_lowrank.optim.ldadam import LDAdam
from dist_lowrank.optim.muon import Muon
from dist_lowrank.optim.param_groups import param_groups
from dist_lowrank.optim.projected_adam import ProjectedAdam
from dist_lowrank.optim.published import published
from dist_lowrank.optim.scale import SCALE
from dist_lowrank.optim.smmf import SMMF
from dist_lowrank.optim.state_dict import full_state_dict
from dist_lowrank.optim.subtrack import SubTrack
from dist_lowrank.optim.trion import Trion
from dist_lowrank.sharding.layouts import LayoutError

__all__ = [
    "CAME",
    "SCALE",
    "SMMF",
    "Adafactor",
    "AdamW8bit",
    "Apollo",
    "DCTAdamW",
    "Dion",
    "Dion3",
    "Fira",
    "Frugal",
    "GaLore",
    "GoLore",
    "Grass",
    "LDAdam",
    "LayoutError",
    "Muon",
    "ProjectedAdam",
    "SubTrack",
    "Trion",
    "full_state_dict",
    "param_groups",
    "published",
    "sum_coefficients",
]
