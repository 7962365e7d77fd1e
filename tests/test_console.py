"""The console: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from dist_lowrank.telemetry.console import duration, quantity

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
