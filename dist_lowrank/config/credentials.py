"""What a credential looks like: neither files nor messages of this package may hold one."""

from __future__ import annotations

import re

# `eos_token_id`, `sample_tokens` and `TOKENIZERS_PARALLELISM` are no secrets; `hf_token` and `WANDB_API_KEY` are.
_NAME = re.compile(
    r"(^|[_-])(token|(api|access|private|secret|storage|account)[_-]?key|secret|pass|credentials?|authorization)$"
    r"|[_-]pwd$|(password|passwd|passphrase)$",
    re.IGNORECASE,
)
_PREFIXED = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[A-Za-z0-9_-]{16,}"
    r"|AKIA[A-Z0-9]{12,}|xox[abp]-\S{10,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_.-]+|-----BEGIN [A-Z ]*PRIVATE KEY"
)
# A port is no password (`https://host:8080/a@b`), nor is the tag of an image (`a:b@sha256:`).
_IN_PLACE = re.compile(
    r"[a-z][a-z0-9+.-]*://[^/\s:@]*:(?!\d{1,5}/)[^\s@]+@(?!sha256:)"  # a URL's
    r"|(^|[\s='\"])[^/\s:@='\"]+:(?!\d{1,5}/|//)[^\s@]+@(?!sha256:)([a-z][\w-]*|\d+\.\d+\.\d+\.\d+)[/:#.]"  # an image's
    r"|[?&;]([\w-]+[_-])?(token|(api|access)?_?key|password|passwd|secret|sig|signature|credential)=[^&\s]"
    r"|\bbearer\s+[^\s'\"]{6,}"
    r"|\bsshpass\b((?!\bssh\b).)*?[\s,'\"]-p"
    r"|--(password|passwd|token|secret|api-?key)[=\s,'\"]",
    re.IGNORECASE,
)


def is_credential(name: str, value: str) -> bool:
    """Whether a setting is likely a credential, by its name or its value.

    Values are told by the prefixes that services give to tokens, or by where they stand: the password in a URL or
    before a registry, a key in a URL's query, the option of a command.
    """
    return bool(_NAME.search(name) or _PREFIXED.search(value) or _IN_PLACE.search(value))
