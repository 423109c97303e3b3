"""Patterns as text: what ``repr`` writes can be read back, in a profile, an adapter or on a command line."""

from __future__ import annotations

import ast

from vsparse.patterns import bands, rules
from vsparse.patterns.algebra import Pattern

__all__ = ["parse"]

_RULES = {name: getattr(module, name) for module in (rules, bands) for name in module.__all__}


def parse(text: str) -> Pattern:
    """A pattern from an expression such as ``"Window(size=(3, 9, 9)) | KeyFrames(frames=(0,))"``.

    Names are those of `vsparse.patterns`, arguments are literals, and ``|``, ``&``, ``~``, ``.T`` and brackets combine.
    Nothing is evaluated. Rules that hold a function of your own have no such form.

    Raises:
        ValueError: anything else, or arguments that a rule refuses.
    """
    try:
        return _pattern(ast.parse(text.strip(), mode="eval").body)
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
    called = isinstance(node, ast.Call)
    name = node.func if isinstance(node, ast.Call) else node
    rule = _RULES.get(name.id) if isinstance(name, ast.Name) else None
    if rule is None:
        raise ValueError(f"{ast.unparse(name)!r} is none of {', '.join(_RULES)}")
    if called != isinstance(rule, type):
        raise ValueError(f"{ast.unparse(name)} is written {'with' if not called else 'without'} parentheses")
    if isinstance(node, ast.Call) and node.args:
        raise ValueError(f"{ast.unparse(node)!r}: arguments go by name, as in Window(size=(3, 9, 9))")
    if not isinstance(node, ast.Call):
        return rule  # type: ignore[no-any-return]
    options = {option.arg or "**": ast.literal_eval(option.value) for option in node.keywords}
    return rule(**options)  # type: ignore[no-any-return]
