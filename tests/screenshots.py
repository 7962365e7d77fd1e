"""Takes the pictures of docs/tensorboard.md: trains small models, starts TensorBoard on them and opens a browser.

    python tests/screenshots.py [--runs FOLDER]

Three optimizers train the default model on two ranks, and one a tiny model on twenty, more than TensorBoard shows one
by one. With `--runs` the folder is kept, and runs that it has already are not made again.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (imported before the fork, so that the ranks need not)
from PIL import Image
from playwright.sync_api import Page
from processes import run_on_ranks
from small_runs import folder_of, overrides_for, write_text
from tensorboard_pages import Server, browse, find_browser, serve

from dist_lowrank.config import RunFolder
from dist_lowrank.training.run import train

PICTURES = Path(__file__).parents[1] / "docs" / "images"
MOST_BYTES = 150_000
COMMON = ("train.export=false", "checkpoint.interval_minutes=null", "checkpoint.at_end=false", "train.sample_tokens=0")
STEPS = ("train.steps=60", "train.eval_interval=10", "train.eval_sequences=64")
OPTIMIZERS = {"dct_adamw": "optimizer.lr=0.006", "trion": "optimizer.lr=0.02", "adamw": "optimizer.lr=0.003"}


def make_runs(folder: Path) -> None:
    """Those that the folder lacks."""
    for name, lr in OPTIMIZERS.items():
        if not list(folder.glob(f"{name}-*/FINISHED")):
            run = folder_of([f"optimizer={name}", lr, f"name={name}", f"runs={folder}", *COMMON, *STEPS])
            run_on_ranks(2, _train, run, timeout_seconds=600)
    if not list(folder.glob("twenty_ranks-*/FINISHED")):
        with tempfile.TemporaryDirectory() as text:
            steps = ("train.steps=12", "train.global_batch_size=20", "telemetry.heat_map_interval=5")
            more = ("name=twenty_ranks", "telemetry.tensorboard=true", *steps, *COMMON)
            run = folder_of(overrides_for(write_text(Path(text)), folder, *more))
            run_on_ranks(20, _train, run, timeout_seconds=600)


def _train(rank: int, run: RunFolder) -> int:
    return train(run.config(), run, torch.device("cpu"))


def take_pictures(server: Server, page: Page) -> None:
    """One of each tab."""
    shown = "^(captured_energy/q_proj|loss/|memory_bytes/(moments|dense_moments)|throughput/tokens)"
    query = urlencode({"tagFilter": shown, "runFilter": "^(dct_adamw|trion|adamw).*rank", "smoothing": 0})
    _open(server, page, "timeseries", 1500, 1000, query)
    page.get_by_role("button", name="Settings").last.click()
    _save(page, "time-series")

    _open(server, page, "custom_scalars", 1500, 1550)
    _fill(page, "Write a regex to filter runs", "^dct_adamw.*rank")
    _fill(page, "weight", "0")  # of the smoothing
    for title in ("rank 0", "rank 1"):
        card = page.locator("tf-custom-scalar-multi-line-chart-card").filter(has=page.get_by_text(title, exact=True))
        card.first.locator(".toggle-matches-button").click()
    _save(page, "custom-scalars")

    _open(server, page, "custom_scalars", 1500, 1200)
    _fill(page, "Write a regex to filter runs", "^twenty_ranks.*rank")
    _fill(page, "weight", "0")
    time.sleep(5)
    page.get_by_text("Over ranks: min, median, max").evaluate("title => title.parentElement.scrollIntoView()")
    _save(page, "custom-scalars-over-ranks")

    _open(server, page, "hparams", 1700, 620)
    for key in ("data.sequence_length", "data.source"):
        page.get_by_text(key, exact=True).first.click()
    _save(page, "hparams")

    _open(server, page, "images", 1300, 800)
    _fill(page, "Write a regex to filter runs", "^twenty_ranks")
    page.get_by_text("Show actual image size").click()
    _save(page, "images")

    _open(server, page, "text", 1400, 900)
    _fill(page, "Filter tags (regular expressions supported)", "parameters")
    _fill(page, "Write a regex to filter runs", "^dct_adamw")
    _save(page, "text")


def _open(server: Server, page: Page, tab: str, width: int, height: int, query: str = "") -> None:
    page.set_viewport_size({"width": width, "height": height})
    page.goto("about:blank")
    page.goto(f"{server.url}/?darkMode=false&{query}#{tab}")
    time.sleep(5)  # the pages never say that they are done


def _fill(page: Page, label: str, text: str) -> None:
    page.locator(f'paper-input[label="{label}"] input').fill(text)


def _save(page: Page, name: str) -> None:
    time.sleep(5)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(96)
    path = PICTURES / f"{name}.png"
    image.save(path, optimize=True)
    assert path.stat().st_size < MOST_BYTES, f"{path}: {path.stat().st_size} bytes; allowed: {MOST_BYTES}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, help="folder to keep the runs in")
    given = parser.parse_args().runs
    browser = find_browser()
    if browser is None:
        raise SystemExit("error: no browser of Chromium's family is installed; `make browser` installs one")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given or Path(temporary, "runs")
        folder.mkdir(parents=True, exist_ok=True)
        make_runs(folder)
        with serve(folder) as server, browse(browser) as page:
            page.set_default_timeout(300_000)
            time.sleep(10)  # it reads the runs
            take_pictures(server, page)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
