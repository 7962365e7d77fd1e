"""Tables on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def empty_table(*, footer: bool = False) -> tuple[Console, Table]:
    """Where to print, and a table to fill; plain, and as wide as it needs, where nobody sees it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # a file has no width to fit
    return console, Table(box=box.SIMPLE if console.is_terminal else None, show_footer=footer, pad_edge=False)
