"""Configuration: the typed schema, compose once, the run folder. Imports neither torch nor transformers."""

from dist_lowrank.config.compose import compose
from dist_lowrank.config.errors import ConfigError
from dist_lowrank.config.run_folder import RunFolder, begin_again, claim, create, open_run
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.config.validate import by_dotted_key, digest, from_dict, to_dict

__all__ = [
    "ConfigError",
    "RunConfig",
    "RunFolder",
    "begin_again",
    "by_dotted_key",
    "claim",
    "compose",
    "create",
    "digest",
    "from_dict",
    "open_run",
    "to_dict",
]
