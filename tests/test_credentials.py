"""Credentials are told from ordinary values, are refused, and are never repeated."""

from __future__ import annotations

import pytest
from refusals import refusal

from dist_lowrank.config import compose
from dist_lowrank.config.credentials import is_credential

CREDENTIALS = [
    ("cache", "https://me:hunter2@host/x"),
    ("cache", "https://:hunter2@host"),
    ("cache", "HTTPS://me:hunter2@host"),
    ("cache", "https://me:hun/ter2@host"),
    ("cache", "https://host/x?a=b&token=hunter2"),
    ("cache", "https://host/x?api_key=hunter2"),
    ("cache", "https://host/x?access_token=hunter2"),
    ("cache", "https://host/x?password=hunter2"),
    ("cache", "https://host/x?X-Amz-Signature=hunter2"),
    ("cache", "https://host/x?se=2030&sig=hunter2"),
    ("DB_PASS", "hunter2"),
    ("PGPASSWORD", "hunter2"),
    ("PRIVATE_KEY", "hunter2"),
    ("HEADER", "Bearer hunter2hunter2"),
    ("ANYTHING", "github_pat_11AAAAAAA0123456789_abcdefgh"),
    ("image", "me:hunter2@registry/x"),
    ("image", "me:hunter2@registry#x"),
    ("options", "--container-image=me:hunter2@registry.org/x:latest"),
    ("remote_shell", "sshpass -p hunter2 ssh"),
    ("remote_shell", "[sshpass,-p,hunter2,ssh]"),
]
NO_CREDENTIALS = [
    ("image", "registry:5000/x@sha256:0123456789abcdef"),
    ("image", "registry.org/team/x:latest@sha256:0123456789abcdef"),
    ("image", "x:22.04@sha256:0123456789abcdef"),
    ("image", "docker://x:22.04@sha256:0123456789abcdef"),
    ("image", "docker://registry:5000/x@sha256:0123456789abcdef"),
    ("image", "registry.org#team/x:latest"),
    ("pretrained", "org/name@main"),
    ("path", "hf://datasets/org/name@main/a:b"),
    ("path", "https://host:8080/x@y"),
    ("path", "/data/a:b@c/*.txt"),
    ("path", "what?token.txt"),
    ("options", "--signal=B:USR1@300"),
    ("remote_shell", "sshpass -e ssh -p 2222"),
    ("remote_shell", "ssh -tt -o BatchMode=yes"),
    ("sort_key", "name"),
    ("OLDPWD", "/data/me"),
    ("GLOO_SOCKET_IFNAME", "bond0:1"),
    ("mounts", "/scratch/text:/data"),
    ("compass", "north"),
]


def test_credentials_are_told_from_ordinary_values() -> None:
    assert [each for each in CREDENTIALS if not is_credential(*each)] == []
    assert [each for each in NO_CREDENTIALS if is_credential(*each)] == []


@pytest.mark.parametrize("key", ["hf_token", "data.api_key", "+model.config.password", "train.client_secret"])
def test_credentials_are_refused_without_being_repeated(key: str) -> None:
    text = refusal(f"{key}=hunter2")
    assert key.lstrip("+") in text
    assert "environment variable" in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("launcher.environment={DB_PASS: hunter2}", "launcher.environment.DB_PASS: credentials"),
        ("https://me:hunter2@host", "an override: credentials"),
        ("data.path={a: hunter2", "data.path: is not an override"),
    ],
)
def test_what_may_be_a_secret_is_not_repeated(override: str, key: str) -> None:
    text = refusal("launcher=slurm", override)
    assert text.startswith(key), text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    "value",
    ["${oc.env:SECRET}", "x-${oc.env:SECRET,none}", "${oc.decode:${oc.env:SECRET}}", "${${data.source}:SECRET}"],
)
@pytest.mark.parametrize("key", ["name", "train.steps"])
def test_nothing_of_the_environment_gets_into_a_configuration(
    key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    text = refusal(f'{key}="{value}"')
    assert text.startswith(f"{key}: {value} is not allowed; allowed: ${{KEY}} of this configuration"), text
    assert "launcher.secret_environment" in text
    assert "hunter2" not in text


@pytest.mark.parametrize("key", ["model.config.pad_token_id=3", "train.sample_tokens=5", "data.tokenizer=t5-base"])
def test_keys_about_tokens_are_no_credentials(key: str) -> None:
    compose([key])
