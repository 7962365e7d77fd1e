from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.console import duration, quantity
from dist_lowrank.telemetry.memory import memory_by_cause
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.telemetry.throughput import (
    StepTimer,
    dense_transformer_flops_per_token,
    matmul_parameter_count,
    model_flops_per_token,
    peak_flops_per_second,
)

# --- metrics


def read_lines(path: Path) -> list[dict[str, object]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_event_files_and_json_lines_hold_the_same(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics" / "rank_0.jsonl", tmp_path / "tensorboard" / "rank_0") as writer:
        for step in range(1, 6):
            values: dict[str, float] = {
                tags.LOSS_TRAIN: 6.0 - step / 7,
                tags.LEARNING_RATE: 1e-3 / step,
                tags.captured_energy("attention.q_proj"): 0.25,
                tags.memory_bytes("parameters"): 29_450_240 + step,
            }
            if step == 5:
                values[tags.LOSS_VALIDATION] = np.float32(5.5)
            writer.log(step, values)

    lines = read_lines(tmp_path / "metrics" / "rank_0.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0][tags.LOSS_TRAIN] == 6.0 - 1 / 7  # full precision
    assert lines[0]["memory_bytes/parameters"] == 29_450_241
    from_lines = {
        (tag, line["step"], line["time"], float(np.float32(value)))
        for line in lines
        for tag, value in line.items()
        if tag not in ("step", "time")
    }
    events = read_events(tmp_path / "tensorboard" / "rank_0")
    from_events = {
        (tag, event.step, event.wall_time, event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    assert len(from_events) == 21
    assert from_events == from_lines


def test_entries_are_on_disk_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "rank_0.jsonl", tmp_path / "tensorboard")
    writer.log(1, {tags.LOSS_TRAIN: 2.0})
    assert read_lines(tmp_path / "rank_0.jsonl")[0][tags.LOSS_TRAIN] == 2.0
    assert [event.value for event in read_events(tmp_path / "tensorboard").Scalars(tags.LOSS_TRAIN)] == [2.0]
    writer.close()


def test_values_that_are_not_finite_stay_valid_json_and_read_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "rank_0.jsonl", tmp_path / "tensorboard") as writer:
        writer.log(1, {"a": float("nan"), "b": float("inf"), "c": -float("inf")})
    (line,) = read_lines(tmp_path / "rank_0.jsonl")
    assert (line["a"], line["b"], line["c"]) == ("NaN", "Infinity", "-Infinity")
    events = read_events(tmp_path / "tensorboard")
    for tag in "abc":
        np.testing.assert_equal(events.Scalars(tag)[0].value, float(str(line[tag])))


def test_a_restarted_run_continues_its_json_lines(tmp_path: Path) -> None:
    for step in (1, 2):
        with MetricsWriter(tmp_path / "rank_0.jsonl", None) as writer:
            writer.log(step, {"loss/train": 1.0})
            writer.text("configuration", "no TensorBoard, no effect")
    assert [line["step"] for line in read_lines(tmp_path / "rank_0.jsonl")] == [1, 2]
    assert list(tmp_path.iterdir()) == [tmp_path / "rank_0.jsonl"]


def test_text_is_shown_in_tensorboard(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "rank_0.jsonl", tmp_path / "tensorboard") as writer:
        writer.text("configuration", "steps: 120")
    (event,) = read_events(tmp_path / "tensorboard").Tensors("configuration/text_summary")
    assert event.tensor_proto.string_val == [b"steps: 120"]


@pytest.mark.parametrize("tag", ["step", "time", "", "loss train", "/loss", "loss/", "loss[0]"])
def test_tags_that_the_two_files_would_name_differently_are_refused(tmp_path: Path, tag: str) -> None:
    with MetricsWriter(tmp_path / "rank_0.jsonl", None) as writer, pytest.raises(ValueError, match="metric tag"):
        writer.log(1, {tag: 1.0})
    assert read_lines(tmp_path / "rank_0.jsonl") == []


def test_closing_twice_is_fine_and_logging_afterwards_is_an_error(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "rank_0.jsonl", tmp_path / "tensorboard")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.log(1, {"loss/train": 1.0})


# --- throughput


class Transformer(nn.Module):
    """An embedding of 10 x 4, a 4 x 4 matrix and a head of 10 x 4, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.matrix = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.matrix(self.embedding(tokens)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_counts_as_multiplied_and_the_input_embedding_does_not(tied: bool) -> None:
    assert matmul_parameter_count(Transformer(tied)) == 4 * 4 + 10 * 4


def test_flops_follow_the_formula_of_palm() -> None:
    assert dense_transformer_flops_per_token(1000, layers=2, attention_width=8, sequence_length=16) == 6000 + 3072


def test_flops_of_a_transformers_model_use_its_heads_not_its_hidden_size() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    layer = 16 * 8 + 2 * 16 * 4 + 8 * 16 + 3 * 16 * 24 + 2 * 16  # q, k and v, o, MLP, norms
    multiplied = 3 * layer + 16 + 50 * 16
    assert model_flops_per_token(LlamaForCausalLM(config), 32) == 6 * multiplied + 12 * 3 * 8 * 32


def test_flops_of_a_mixture_of_experts_are_unknown() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    assert model_flops_per_token(MixtralForCausalLM(config), 32) is None


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "tf32", 494.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp64", None),
    ],
)
def test_peak_is_the_dense_figure_of_exactly_that_gpu(name: str, dtype: str, teraflops: float | None) -> None:
    assert peak_flops_per_second(name, dtype) == (None if teraflops is None else teraflops * 1e12)


def test_step_timer_splits_the_optimizer_off_and_leaves_pauses_out() -> None:
    started = time.perf_counter()
    timer = StepTimer(torch.device("cpu"))
    for _ in range(3):
        time.sleep(0.01)
        with timer.optimizer():
            time.sleep(0.02)
        timer.end_step(100)
    with timer.paused():
        time.sleep(0.3)
    times = timer.read()
    elapsed = time.perf_counter() - started
    assert (times.steps, times.tokens) == (3, 300)
    assert 0.06 <= times.optimizer_seconds <= times.seconds - 0.03
    assert 0.09 <= times.seconds <= elapsed - 0.3
    assert times.optimizer_milliseconds == pytest.approx(1000 * times.optimizer_seconds / 3)
    assert times.optimizer_share == times.optimizer_seconds / times.seconds
    assert times.tokens_per_second == 300 / times.seconds
    with pytest.raises(RuntimeError, match="no step"):
        timer.read()  # the interval is fresh


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_timer_sees_the_time_that_the_gpu_takes_in_the_optimizer() -> None:
    matrix = torch.randn(8192, 8192, device="cuda")
    matrix @ matrix
    torch.cuda.synchronize()
    timer = StepTimer(torch.device("cuda"))
    started = time.perf_counter()
    with timer.optimizer():
        for _ in range(20):
            matrix @ matrix
    timer.end_step(1)
    launched_seconds = time.perf_counter() - started
    times = timer.read()
    assert launched_seconds < times.optimizer_seconds <= times.seconds


# --- memory


def test_memory_of_a_tied_model_with_adamw_is_what_one_counts_by_hand() -> None:
    model = Transformer(tied=True)
    optimizer = torch.optim.AdamW(model.parameters())
    parameter_bytes = 4 * (10 * 4 + 4 * 4)
    assert memory_by_cause(model, optimizer) == {
        "parameters": parameter_bytes,
        "gradients": 0,
        "dense_moments": 0,
    }
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    assert memory_by_cause(model, optimizer) == {
        "parameters": parameter_bytes,
        "gradients": parameter_bytes,
        "dense_moments": 2 * parameter_bytes + 2 * 4,  # two moments and a step count for each of two tensors
    }
    optimizer.zero_grad()
    assert memory_by_cause(model, optimizer)["gradients"] == 0


def test_gradients_that_share_a_bucket_count_the_bucket_once() -> None:
    model = Transformer(tied=False)
    bucket = torch.zeros(sum(p.numel() for p in model.parameters()) + 8)  # with padding
    position = 0
    for parameter in model.parameters():
        parameter.grad = bucket[position : position + parameter.numel()].view_as(parameter)
        position += parameter.numel()
    assert memory_by_cause(model, torch.optim.SGD(model.parameters()))["gradients"] == 4 * bucket.numel()


def test_an_optimizer_that_accounts_for_itself_is_believed() -> None:
    class OneIndexPerParameter(torch.optim.Optimizer):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters, {})
            for parameter in parameters:
                self.state[parameter]["index"] = torch.zeros(1, dtype=torch.int16)

        def memory_bytes(self) -> dict[str, int]:
            return {"indices": 2 * len(self.state), "dictionary": 512}

    model = Transformer(tied=False)
    by_cause = memory_by_cause(model, OneIndexPerParameter(list(model.parameters())))
    assert by_cause == {"parameters": 4 * 96, "gradients": 0, "indices": 6, "dictionary": 512}


def sharded_memory(rank: int) -> dict[str, int]:
    model = nn.Linear(6, 7, bias=False)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return memory_by_cause(model, optimizer)


def test_each_rank_counts_its_own_shards_under_fsdp() -> None:
    first, second = on_two_processes(sharded_memory)
    # 7 rows on 2 ranks: 4 and 3; FSDP2 stores the weight of both ranks with the same padded size.
    assert first == {"parameters": 4 * 4 * 6, "gradients": 4 * 4 * 6, "dense_moments": 2 * 4 * 4 * 6 + 4}
    assert second == {"parameters": 4 * 4 * 6, "gradients": 4 * 4 * 6, "dense_moments": 2 * 4 * 3 * 6 + 4}


def on_two_processes(function: Callable[[int], dict[str, int]]) -> list[dict[str, int]]:
    """What the function returns on each of two forked gloo ranks."""
    context = multiprocessing.get_context("fork")

    def work(rank: int, store: str, connection: multiprocessing.connection.Connection) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        connection.send(function(rank))
        dist.barrier()
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        processes = [
            context.Process(target=work, args=(rank, f"{folder}/store", sender), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            assert all(receiver.poll(60) for receiver, _ in pipes)
            results = [receiver.recv() for receiver, _ in pipes]
        finally:
            for process in processes:
                process.join(30)
                process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return results


# --- console

RUN = """
import sys, time
from dist_lowrank.telemetry.console import Console

with Console(enabled={enabled}, interval=10) as console:
    console.line("run runs/tiny [1/2]")
    console.start({total})
    for step in range(1, {total} + 1):
        console.step(step, loss=6.1234, learning_rate=1e-3, tokens_per_second=3210.0, flops_per_second=12.3e9,
                     mfu={mfu}, optimizer_share=0.07, eta_seconds=62)
        if step == {total} // 2:
            console.validation(step, 5.0, 148.413)
            print("printed by other code", flush=True)
            {then}
console.line("done")
"""


def script(*, total: int = 24, enabled: bool = True, mfu: float | None = None, then: str = "pass") -> list[str]:
    return [sys.executable, "-c", RUN.format(total=total, enabled=enabled, mfu=mfu, then=then)]


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM")}
    return {**kept, "TERM": "xterm-256color", **changes}


def test_plain_lines_in_a_pipe_are_exactly_these_even_where_colour_is_forced() -> None:
    done = subprocess.run(script(), env=environment(FORCE_COLOR="1"), capture_output=True, text=True, check=True)
    figures = "loss 6.1234  lr 1.00e-03  3.21k tokens/s  12.3 GFLOP/s  optimizer 7%  ETA 1:02"
    assert done.stdout.splitlines() == [
        "run runs/tiny [1/2]",
        f"step 1/24  {figures}",
        f"step 10/24  {figures}",
        "step 12/24  validation loss 5.0000  perplexity 148.41",
        "printed by other code",
        f"step 20/24  {figures}",
        f"step 24/24  {figures}",
        "done",
    ]
    assert done.stderr == ""


def test_plain_lines_come_where_figures_do_not_fall_on_the_interval() -> None:
    program = (
        "from dist_lowrank.telemetry.console import Console\n"
        "console = Console(interval=10)\n"
        "console.start(40)\n"
        "for step in range(3, 41, 3): console.step(step, loss=float('nan'), learning_rate=0.0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"step {step}/40  loss nan  lr 0.00e+00" for step in (3, 12, 21, 30)]


def test_other_ranks_are_silent() -> None:
    done = subprocess.run(script(enabled=False), capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("printed by other code\n", "")
    returncode, output = in_terminal(script(enabled=False))
    assert (returncode, output) == (0, "printed by other code\r\n")


def in_terminal(
    command: list[str],
    *,
    columns: int = 80,
    env: dict[str, str] | None = None,
    act: tuple[str, Callable[[int, subprocess.Popen[bytes]], object]] | None = None,
) -> tuple[int, str]:
    """Runs a command in a pseudo-terminal of its own.

    `act` is what to do, with the terminal's master side and the process, once a text has been seen. Asserts that the
    terminal's settings end as they began.
    """
    import fcntl
    import pty
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    settings = termios.tcgetattr(slave)
    # The terminal must be the controlling one for Ctrl-C to become a signal, which background jobs inherit as ignored.
    take_over = (
        "import fcntl, os, signal, sys, termios\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", take_over, *command],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=env or environment(),
        start_new_session=True,
    )
    output = b""
    try:
        # Our copy of the slave stays open to read the settings at the end, so the end of the output is the process's.
        os.set_blocking(master, False)
        while True:
            ended = process.poll() is not None
            try:
                output += os.read(master, 65536)
            except BlockingIOError:
                if ended:
                    break
                time.sleep(0.01)
            if act is not None and act[0].encode() in output:
                act[1](master, process)
                act = None
        assert termios.tcgetattr(slave) == settings
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)
    return process.returncode, output.decode()


def cursor_is_visible(output: str) -> bool:
    return output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")


def without_controls(output: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)


def test_a_terminal_gets_a_bar_with_all_figures_that_ends_complete() -> None:
    returncode, output = in_terminal(script(mfu=0.412))
    assert returncode == 0
    plain = without_controls(output)
    last = plain[plain.rindex("step 24/24") :]
    assert "━" in last
    assert "100% ETA 1:02" in last
    assert "\r\nloss 6.1234  lr 1.00e-03  3.21k tokens/s  12.3 GFLOP/s  MFU 41.2%  optimizer 7%\r\ndone\r\n" in last
    assert cursor_is_visible(output)


def test_lines_scroll_above_the_bar_as_they_are() -> None:
    _, output = in_terminal(script())
    lines = without_controls(output).split("\r\n")
    assert lines[0] == "run runs/tiny [1/2]"
    assert any(line.endswith("step 12/24  validation loss 5.0000  perplexity 148.41") for line in lines)
    below_other_code = lines[[line.split("\r")[-1] for line in lines].index("printed by other code") + 1]
    assert below_other_code.startswith("step 12/24 ━")  # the bar is drawn again


@pytest.mark.parametrize("columns", [30, 80])
def test_the_bar_keeps_to_its_two_lines_whatever_the_width(columns: int) -> None:
    _, output = in_terminal(script(mfu=0.412), columns=columns)
    drawn = [line for line in re.split(r"[\r\n]+", without_controls(output)) if "━" in line or "lr 1.00e-03" in line]
    assert len(drawn) > 4
    assert max(map(len, drawn)) <= columns
    # Rewinding moves up by one line, never more: the figures were not wrapped.
    assert set(re.findall(r"(?:\x1b\[1A\x1b\[2K)+", output)) == {"\x1b[1A\x1b[2K"}


def test_no_color_is_honoured_in_a_terminal() -> None:
    colour = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7])[;m]")
    _, coloured = in_terminal(script())
    _, plain = in_terminal(script(), env=environment(NO_COLOR="1"))
    assert colour.search(coloured)
    assert not colour.search(plain)
    assert "━" in plain


def test_a_dumb_terminal_gets_plain_lines() -> None:
    _, output = in_terminal(script(), env=environment(TERM="dumb"))
    assert "\x1b" not in output
    assert "step 10/24  loss 6.1234" in output


def test_ctrl_c_leaves_the_terminal_sane() -> None:
    returncode, output = in_terminal(
        script(then="time.sleep(60)"), act=("printed by other code", lambda master, _: os.write(master, b"\x03"))
    )
    assert returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in output
    assert cursor_is_visible(output)
    # The traceback starts below the bar.
    assert "optimizer 7%\r\nTraceback" in without_controls(output)


def test_an_exception_leaves_the_terminal_sane() -> None:
    returncode, output = in_terminal(script(then="raise RuntimeError('no more')"))
    assert returncode == 1
    assert "RuntimeError: no more" in output
    assert cursor_is_visible(output)
    assert "optimizer 7%\r\nTraceback" in without_controls(output)


def test_a_killed_process_leaves_the_cursor_visible() -> None:
    returncode, output = in_terminal(
        script(then="time.sleep(60)"), act=("printed by other code", lambda _, process: process.kill())
    )
    assert returncode == -signal.SIGKILL
    assert cursor_is_visible(output)


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.5, "0.5"), (999.4, "999"), (999.6, "1k"), (3200, "3.2k"), (12.34e9, "12.3G")]
)
def test_quantities_have_three_digits_and_a_prefix(value: float, shown: str) -> None:
    assert quantity(value) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (61.6, "1:02"), (59.7, "1:00"), (93_784, "26:03:04")])
def test_durations_read_like_a_clock(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
