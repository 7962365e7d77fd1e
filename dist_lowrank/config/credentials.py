"""What a credential looks like: neither files nor messages of this package may hold one."""

from __future__ import annotations

import re

# `eos_token_id`, `sample_tokens` and `TOKENIZERS_PARALLELISM` are no secrets; `hf_token` and `WANDB_API_KEY` are.
_NAME = re.compile(r"(^|_)(token|api_?key|access_?key|secret|password|passwd|credentials?)$", re.IGNORECASE)
_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[opsu]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{12,}|xox[abp]-\S{10,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_.-]+|-----BEGIN [A-Z ]*PRIVATE KEY|[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@"
)


def is_credential(name: str, value: str) -> bool:
    """Whether a setting is likely a credential, by its name or its value: a token, a key, a URL with a password."""
    return bool(_NAME.search(name) or _VALUE.search(value))
