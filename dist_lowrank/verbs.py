"""How a verb is added to the command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Action: TypeAlias = Callable[[argparse.Namespace], int]


def add_verb(
    verbs: Verbs, name: str, action: Action, summary: str, *, details: str = ".", epilog: str
) -> argparse.ArgumentParser:
    """Adds a verb to the command's parser.

    Args:
        action: what it does with its options; returns the exit code.
        summary: a line, in lower case, for the list of verbs.
        details: what follows it in the verb's own help.
        epilog: printed as it is.

    Returns:
        The verb's parser, for its options.
    """
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + details,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(action=action)
    return parser
