"""`--assert 'state_bytes.max <= 0.35 * baseline'`: a small language of numbers, quantities and comparisons.

The text is parsed by Python's own parser and then walked; nothing of it is ever executed, and what is not listed here
is refused. `baseline.QUANTITY` is the quantity of the first run (or group of seeds); `baseline` alone is that of the
one quantity that the same comparison names.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from dist_lowrank.config import ConfigError

_ALLOWED = "numbers, quantities, baseline, + - * /, abs(), <= < >= > == !=, and, or, not, parentheses"
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.LtE: operator.le,
    ast.Lt: operator.lt,
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@dataclass(frozen=True, slots=True)
class Assertion:
    """A parsed expression."""

    text: str
    tree: ast.expr


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether an assertion holds for one group, and the numbers that decided it."""

    text: str
    label: str
    holds: bool
    numbers: Mapping[str, float]  # by name, `baseline.` in front for those of the first group
    interpolated: Collection[str] = ()  # those of the numbers that lie between two measurements

    @property
    def shown(self) -> str:
        """The numbers for a reader, `~` before those that are interpolated."""
        marks = {name: "~" if name in self.interpolated else "" for name in self.numbers}
        return ", ".join(f"{name} = {marks[name]}{value:,.10g}" for name, value in self.numbers.items())


def parse(text: str) -> Assertion:
    """Parses an expression and checks that it is one of this language.

    Raises:
        ConfigError: if not; it says what is allowed.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refused(text, f"is no expression ({getattr(error, 'msg', error)})") from error
    _check_condition(tree, text)
    return Assertion(text, tree)


def evaluate(
    assertion: Assertion, label: str, values: Mapping[str, float | None], baseline: Mapping[str, float | None]
) -> Outcome:
    """Evaluates an assertion about one group.

    Raises:
        ConfigError: if it names a quantity that does not exist or that the run does not have, or divides by zero.
    """
    evaluation = _Evaluation(assertion.text, label, values, baseline, {})
    holds = evaluation.condition(assertion.tree)
    return Outcome(assertion.text, label, holds, evaluation.numbers)


@dataclass(frozen=True, slots=True)
class _Evaluation:
    text: str
    label: str
    values: Mapping[str, float | None]
    baseline: Mapping[str, float | None]
    numbers: dict[str, float]

    def condition(self, node: ast.expr) -> bool:
        if isinstance(node, ast.BoolOp):
            outcomes = [self.condition(each) for each in node.values]  # all of them, so that all names are checked
            return all(outcomes) if isinstance(node.op, ast.And) else any(outcomes)
        if isinstance(node, ast.UnaryOp):
            return not self.condition(node.operand)
        assert isinstance(node, ast.Compare)
        subject = self._subject(node)
        sides = [self.number(each, subject) for each in (node.left, *node.comparators)]
        pairs = zip(node.ops, sides[:-1], sides[1:], strict=True)
        return all(_COMPARISONS[type(op)](left, right) for op, left, right in pairs)

    def number(self, node: ast.expr, subject: str | None) -> float:
        if isinstance(node, ast.Constant):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.Call):
            return abs(self.number(node.args[0], subject))
        if isinstance(node, ast.UnaryOp):
            value = self.number(node.operand, subject)
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.BinOp):
            left, right = self.number(node.left, subject), self.number(node.right, subject)
            try:
                return _ARITHMETIC[type(node.op)](left, right)
            except ZeroDivisionError as error:
                raise _refused(self.text, f"divides by {ast.unparse(node.right)}, which is 0") from error
        return self._named(_dotted(node), subject)

    def _named(self, name: str, subject: str | None) -> float:
        if name == "baseline":
            if subject is None:
                raise _refused(
                    self.text,
                    "baseline has no meaning where a comparison names several quantities or none",
                    "baseline.QUANTITY",
                )
            name = f"baseline.{subject}"
        of_baseline = name.startswith("baseline.")
        quantity = name.removeprefix("baseline.")
        known = self.baseline if of_baseline else self.values
        if quantity not in known:
            near = _nearest(quantity, known)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(
                f"--assert {self.text}: no quantity is called {quantity}; {hint}allowed: one of the {len(known)} "
                "quantities that `dist-lowrank compare --help` explains and the report's compare.csv lists"
            )
        value = known[quantity]
        if value is None:
            have = [each for each, number in known.items() if number is not None]
            near = _nearest(quantity, have) or have[:3]
            who = "the baseline" if of_baseline else self.label
            raise ConfigError(
                f"--assert {self.text}: {who} has no {quantity} (`-` in the tables); allowed: one of the {len(have)} "
                f"quantities that it has, such as {', '.join(near)}"
            )
        self.numbers[name] = value
        return value

    def _subject(self, comparison: ast.Compare) -> str | None:
        """The one quantity that a comparison names."""
        names = set(_names(comparison)) - {"baseline"}
        own = {name.removeprefix("baseline.") for name in names}
        return own.pop() if len(own) == 1 else None


def _check_condition(node: ast.expr, text: str) -> None:
    """A truth value: comparisons, joined by `and`, `or`, `not`."""
    if isinstance(node, ast.BoolOp):
        for each in node.values:
            _check_condition(each, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_condition(node.operand, text)
    elif isinstance(node, ast.Compare) and all(type(op) in _COMPARISONS for op in node.ops):
        for each in (node.left, *node.comparators):
            _check_number(each, text)
    else:
        raise _refused(text, f"{ast.unparse(node)} is no comparison")


def _check_number(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        _check_number(node.left, text)
        _check_number(node.right, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        _check_number(node.operand, text)
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "abs"
        and len(node.args) == 1
        and not node.keywords
    ):
        _check_number(node.args[0], text)
    elif not _dotted(node):
        raise _refused(text, f"{ast.unparse(node)} is not allowed")


def _dotted(node: ast.expr) -> str:
    """`state_bytes.max`; nothing if the node is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def _names(node: ast.expr) -> Iterator[str]:
    if name := _dotted(node):
        yield name
    elif isinstance(node, ast.Call):
        yield from _names(node.args[0])
    else:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from _names(child)


def _nearest(given: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Names that begin as the given one does, or else look like it."""
    names = list(known)
    return [n for n in names if n.startswith(given)][:most] or difflib.get_close_matches(given, names, most)


def _refused(text: str, reason: str, allowed: str = _ALLOWED) -> ConfigError:
    return ConfigError(f"--assert {text}: {reason}; allowed: {allowed}")
