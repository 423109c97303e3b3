"""Static 3-D patterns: rules over pairs of token positions, how they combine, and their exact block form."""

from __future__ import annotations

from vsparse.patterns.algebra import Complement, Intersection, Pattern, Separable, Transposed, Union, block_map
from vsparse.patterns.bands import Band, FrameBand
from vsparse.patterns.boxes import Bounds, Box
from vsparse.patterns.rules import (
    Axis,
    Cells,
    Everything,
    KeyFrames,
    KeyStride,
    Nothing,
    Offset,
    Stride,
    Text,
    Window,
    everything,
    nothing,
    same_frame,
    same_position,
    text_keys,
    text_queries,
)
from vsparse.patterns.text import parse

__all__ = [
    "Axis",
    "Band",
    "Bounds",
    "Box",
    "Cells",
    "Complement",
    "Everything",
    "FrameBand",
    "Intersection",
    "KeyFrames",
    "KeyStride",
    "Nothing",
    "Offset",
    "Pattern",
    "Separable",
    "Stride",
    "Text",
    "Transposed",
    "Union",
    "Window",
    "block_map",
    "everything",
    "nothing",
    "parse",
    "same_frame",
    "same_position",
    "text_keys",
    "text_queries",
]
