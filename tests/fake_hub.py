"""A small Hugging Face hub on loopback that serves folders as data sets, for tests of streaming.

It answers the requests that `datasets.load_dataset(..., streaming=True)` makes: facts about a repository, listings of
its files, and the files with byte ranges. A client must have HF_ENDPOINT in its environment before it imports
`datasets`, so it is a process of its own, started with `client_environment`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class FakeHub:
    """Serve `root/OWNER/NAME/...` while inside `with`; `requests` lists what was asked, as "METHOD path"."""

    root: Path
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def files(self, repository: str) -> list[str]:
        folder = self.root / repository
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def entry(self, repository: str, file: str) -> dict[str, Any]:
        content = (self.root / repository / file).read_bytes()
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def client_environment(endpoint: str, home: Path) -> dict[str, str]:
    """The environment of a process that knows only the hub at `endpoint` and keeps its caches in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


def write_c4(root: Path, train: Sequence[Sequence[str]], validation: Sequence[str]) -> Path:
    """Documents in the layout of allenai/c4: gzipped JSON lines, one file for each item of `train`."""
    folder = root / "allenai" / "c4"
    (folder / "en").mkdir(parents=True)
    front_matter = """configs:
- config_name: en
  data_files:
  - {split: train, path: en/c4-train.*.json.gz}
  - {split: validation, path: en/c4-validation.*.json.gz}"""
    _write_readme(folder, front_matter)
    for number, documents in enumerate(train):
        _write_json_lines(folder / "en" / f"c4-train.{number:05d}-of-{len(train):05d}.json.gz", documents)
    _write_json_lines(folder / "en" / "c4-validation.00000-of-00001.json.gz", validation)
    return folder


def write_fineweb_edu(root: Path, train: Sequence[Sequence[str]]) -> Path:
    """Documents in the layout of HuggingFaceFW/fineweb-edu, sample-10BT: one Parquet file for each item of `train`."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    folder = root / "HuggingFaceFW" / "fineweb-edu"
    (folder / "sample" / "10BT").mkdir(parents=True)
    front_matter = """configs:
- config_name: sample-10BT
  data_files:
  - {split: train, path: sample/10BT/*}"""
    _write_readme(folder, front_matter)
    for number, documents in enumerate(train):
        names = [f"<urn:uuid:{number}-{index}>" for index in range(len(documents))]
        table = pa.table({"text": list(documents), "id": names, "score": [3.0] * len(documents)})
        parquet.write_table(table, folder / "sample" / "10BT" / f"{number:03d}_00000.parquet", row_group_size=16)
    return folder


def _write_readme(folder: Path, front_matter: str) -> None:
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n", "utf-8")


def _write_json_lines(file: Path, documents: Iterable[str]) -> None:
    rows = ({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://localhost/"} for text in documents)
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        api = re.fullmatch(
            r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path.rstrip("/")
        )
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path)
        repository = (api or file)[1] if api or file else ""
        if not repository or not (self.hub.root / repository).is_dir():
            self._send_missing("RepoNotFound")
        elif file:
            self._send_file(repository, file[2])
        elif api[2] == "tree":
            recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
            self._send_tree(repository, (api[4] or "").strip("/"), recursive)
        elif api[2] == "paths-info":
            self._send_paths(repository, body)
        else:
            self._send_facts(repository)

    def _send_facts(self, repository: str) -> None:
        self._send_json(
            {
                "_id": "0",
                "id": repository,
                "author": repository.split("/")[0],
                "sha": COMMIT,
                "private": False,
                "disabled": False,
                "gated": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": file} for file in self.hub.files(repository)],
                "createdAt": "2026-01-01T00:00:00.000Z",
                "lastModified": "2026-01-01T00:00:00.000Z",
            }
        )

    def _send_tree(self, repository: str, folder: str, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        below = [file for file in self.hub.files(repository) if file.startswith(prefix)]
        if not below:
            self._send_missing("EntryNotFound")
            return
        direct = [file for file in below if recursive or "/" not in file[len(prefix) :]]
        folders = sorted({prefix + file[len(prefix) :].split("/")[0] for file in below if file not in direct})
        self._send_json([_folder(name) for name in folders] + [self.hub.entry(repository, file) for file in direct])

    def _send_paths(self, repository: str, body: bytes) -> None:
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        files = self.hub.files(repository)
        found = [self.hub.entry(repository, path) for path in asked if path in files]
        found += [_folder(path) for path in asked if any(file.startswith(f"{path.strip('/')}/") for file in files)]
        self._send_json(found)

    def _send_file(self, repository: str, file: str) -> None:
        if file not in self.hub.files(repository):
            self._send_missing("EntryNotFound")
            return
        content = (self.hub.root / repository / file).read_bytes()
        headers = {"ETag": f'"{self.hub.entry(repository, file)["oid"]}"', "X-Repo-Commit": COMMIT}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, content, {"Accept-Ranges": "bytes", **headers})
            return
        first = int(wanted[1] or 0)
        last = min(int(wanted[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": COMMIT}
