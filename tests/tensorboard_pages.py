"""A real TensorBoard server, its HTTP interface, and its pages in a headless browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from playwright.sync_api import Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Server:
    """Of one folder of runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, route: str, **parameters: str | int) -> Any:
        """JSON of a plugin's route, such as `scalars/tags`."""
        with urlopen(f"{self.url}/data/plugin/{route}?{urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)

    def get_bytes(self, route: str) -> bytes:
        with urlopen(f"{self.url}/data/plugin/{route}", timeout=30) as answer:
            data: bytes = answer.read()
            return data

    def post(self, route: str, body: dict[str, Any]) -> Any:
        request = Request(
            f"{self.url}/data/plugin/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=30) as answer:
            return json.load(answer)


@contextmanager
def serve(folder: Path, timeout_seconds: float = 60) -> Iterator[Server]:
    """Serves a folder on loopback, at a port that is free."""
    options = ["--logdir", folder.name, "--host", "127.0.0.1", "--port", "0"]
    with (folder / "tensorboard.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *options],
            cwd=folder.parent,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )
        try:
            deadline = time.monotonic() + timeout_seconds
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", Path(log.name).read_text())):
                assert server.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline, "TensorBoard does not start"
                time.sleep(0.1)
            yield Server(found[0])
        finally:
            server.terminate()
            server.wait(20)


def find_browser() -> str | None:
    """The path of an installed browser of Chromium's family."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def browse(browser: str, width: int = 1400, height: int = 1000) -> Iterator[Page]:
    """A page of a headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, which containers are, Chromium has no sandbox.
        instance = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield instance.new_page(viewport={"width": width, "height": height})
        finally:
            instance.close()
