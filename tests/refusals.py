"""What a configuration is refused with."""

from __future__ import annotations

import pytest

from dist_lowrank.config import ConfigError, compose


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)
