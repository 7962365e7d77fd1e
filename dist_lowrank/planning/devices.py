"""How much memory accelerators have, as their makers publish it."""

from __future__ import annotations

import re

from dist_lowrank.config import ConfigError
from dist_lowrank.config.errors import suggestion

_GIB = 2**30
_MOST_BYTES = 2**60
# In GiB, per device that a process sees (a MI250X has two).
_CAPACITIES_GIB = {
    "a10": 24,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "a40": 48,
    "b200": 180,
    "b300": 270,
    "gh200": 96,
    "h100": 80,
    "h20": 96,
    "h200": 141,
    "l4": 24,
    "l40s": 48,
    "mi210": 64,
    "mi250x": 64,
    "mi300x": 192,
    "mi325x": 256,
    "mi355x": 288,
    "rtx-3090": 24,
    "rtx-4090": 24,
    "rtx-5090": 32,
    "rtx-6000-ada": 48,
    "t4": 16,
    "v100-16gb": 16,
    "v100-32gb": 32,
}
_ALIASES = {"a100": "a100-80gb", "h100-80gb": "h100", "v100": "v100-32gb", "rtx4090": "rtx-4090", "rtx3090": "rtx-3090"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": _GIB}


def capacity_bytes(device: str, key: str = "--device") -> int:
    """Of a device by name, or a number of bytes such as `80GiB`, `24GB` or `25769803776`.

    Raises:
        ConfigError: for a name that is not known, or a number that is not allowed.
    """
    name = re.sub(r"[\s_]+", "-", device.strip().lower())
    name = _ALIASES.get(name, name)
    if name in _CAPACITIES_GIB:
        return _CAPACITIES_GIB[name] * _GIB
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", device.strip())
    if match and match[2].upper() in _UNITS and match[1].count(".") <= 1 and match[1] != ".":
        size_bytes = float(match[1]) * _UNITS[match[2].upper()]
        if 1 <= size_bytes <= _MOST_BYTES:
            return int(size_bytes)
    hint = suggestion(name, sorted(_CAPACITIES_GIB))
    raise ConfigError(
        f"{key}: {device or 'nothing'} is not allowed; {hint}allowed: 1 to 2^60 bytes such as 80GiB, or one of "
        + ", ".join(sorted(_CAPACITIES_GIB))
    )
