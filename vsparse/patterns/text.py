"""Patterns as text: what ``repr`` writes can be read back, in a profile, an adapter or on a command line."""

from __future__ import annotations

import ast

from vsparse.patterns import bands, presets, rules
from vsparse.patterns.algebra import Pattern

__all__ = ["parse"]

_RULES = {name: getattr(module, name) for module in (rules, bands) for name in module.__all__}
_ONE = {name: getattr(presets, name) for name in ("divided", "interleaved", "neighborhood", "unidirectional", "window")}
_SEVERAL = {name: getattr(presets, name) for name in ("global_local", "shards", "shifted_chunks", "stripes")}


def parse(text: str) -> Pattern | tuple[Pattern, ...]:
    """A pattern from an expression such as ``"Window(size=(3, 9, 9)) | KeyFrames(frames=(0,))"``.

    Names are those of `vsparse.patterns`, arguments are literals, and ``|``, ``&``, ``~``, ``.T`` and brackets combine.
    Nothing is evaluated. Rules that hold a function of your own have no such form. A preset with one pattern for each
    head, such as ``"stripes(heads=12, width=2)"``, stands alone and gives a tuple.

    Raises:
        ValueError: anything else, or arguments that a rule refuses.
    """
    try:
        body = ast.parse(text.strip(), mode="eval").body
        if isinstance(body, ast.Call) and isinstance(body.func, ast.Name) and body.func.id in _SEVERAL:
            return _SEVERAL[body.func.id](**_options(body))  # type: ignore[no-any-return]
        return _pattern(body)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{text!r} is not a pattern: {error}") from error


def _pattern(node: ast.expr) -> Pattern:
    match node:
        case ast.BinOp(op=ast.BitOr()):
            return _pattern(node.left) | _pattern(node.right)
        case ast.BinOp(op=ast.BitAnd()):
            return _pattern(node.left) & _pattern(node.right)
        case ast.UnaryOp(op=ast.Invert()):
            return ~_pattern(node.operand)
        case ast.Attribute(attr="T"):
            return _pattern(node.value).T
    name = node.func if isinstance(node, ast.Call) else node
    known = _RULES | _ONE
    rule = known.get(name.id) if isinstance(name, ast.Name) else None
    if rule is None:
        if isinstance(name, ast.Name) and name.id in _SEVERAL:
            raise ValueError(f"{name.id} gives one pattern for each head and combines with nothing")
        raise ValueError(f"{ast.unparse(name)!r} is none of {', '.join(known | _SEVERAL)}")
    if isinstance(node, ast.Call) != callable(rule):
        raise ValueError(f"{ast.unparse(name)} is written {'with' if callable(rule) else 'without'} parentheses")
    return rule(**_options(node)) if isinstance(node, ast.Call) else rule  # type: ignore[no-any-return]


def _options(node: ast.Call) -> dict[str, object]:
    if node.args:
        raise ValueError(f"{ast.unparse(node)!r}: arguments go by name, as in Window(size=(3, 9, 9))")
    return {option.arg or "**": ast.literal_eval(option.value) for option in node.keywords}
