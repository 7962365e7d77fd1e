"""How a model is spread over ranks: `native` (ddp, FSDP2, HSDP) and `deepspeed` (ZeRO).

`deepspeed` is imported by those who use it only. Neither imports the configuration, so that both work in a trainer of
one's own.
"""

from dist_lowrank.strategies.native import (
    WEIGHT_DTYPES,
    apply_strategy,
    autocast,
    gradient_sync,
    reshard,
    shard_count,
    shard_dimension,
)

__all__ = ["WEIGHT_DTYPES", "apply_strategy", "autocast", "gradient_sync", "reshard", "shard_count", "shard_dimension"]
