"""Clips of one coloured shape that moves: prompts that a program can check, for the embedded model to learn."""

from __future__ import annotations

import dataclasses as dc
import itertools
import math
import random
import re
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "DIRECTIONS",
    "RADII",
    "SHAPES",
    "TRAVELS",
    "Scene",
    "distance",
    "draw",
    "held_out",
    "parse",
    "scenes",
    "training_scenes",
]

COLORS = {
    "red": (0.88, 0.16, 0.16),
    "green": (0.16, 0.75, 0.24),
    "blue": (0.18, 0.29, 0.92),
    "yellow": (0.94, 0.86, 0.16),
    "cyan": (0.16, 0.84, 0.88),
    "purple": (0.75, 0.20, 0.84),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y downwards
BACKGROUNDS = {"dark": (0.05, 0.22), "light": (0.72, 0.92)}  # grey levels
RADII = (0.13, 0.16)
"""Radius of a circle of the same area, in widths of the picture: all shapes of one radius have one area."""
TRAVELS = (0.40, 0.55)
"""How far the shape moves from the first frame to the last, in widths of the picture."""
MARGIN = 0.01
TINT = 0.03
SLOPE = 0.08
PLAIN = 0.3  # share of the grounds without a slope

# Regular shapes of area pi around their centre of mass: how far the sides lie from it, how far it reaches.
_SQUARE = math.sqrt(math.pi) / 2
_TRIANGLE = math.sqrt(math.pi / math.sqrt(27))
_REACH = {  # to the left and right, up, down
    "circle": (1.0, 1.0, 1.0),
    "square": (_SQUARE, _SQUARE, _SQUARE),
    "triangle": (math.sqrt(3) * _TRIANGLE, 2 * _TRIANGLE, _TRIANGLE),
}


@dc.dataclass(frozen=True, kw_only=True)
class Scene:
    """What a clip shows; one of 144.

    Args:
        color: A key of `COLORS`. shape: One of `SHAPES`. direction: A key of `DIRECTIONS`.
        background: A key of `BACKGROUNDS`.

    Raises:
        ValueError: an unknown word.
    """

    color: str
    shape: str
    direction: str
    background: str

    def __post_init__(self) -> None:
        known = {"color": COLORS, "shape": SHAPES, "direction": DIRECTIONS, "background": BACKGROUNDS}
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")

    @property
    def prompt(self) -> str:
        """The sentence that asks for this scene: `a red circle moving right on a dark background`."""
        return f"a {self.color} {self.shape} moving {self.direction} on a {self.background} background"


def scenes() -> tuple[Scene, ...]:
    """All 144 scenes, backgrounds changing fastest."""
    return tuple(
        Scene(color=color, shape=shape, direction=direction, background=background)
        for color, shape, direction, background in itertools.product(COLORS, SHAPES, DIRECTIONS, BACKGROUNDS)
    )


def held_out() -> tuple[Scene, ...]:
    """24 scenes that training never sees: 4 of each colour, 8 of each shape, 6 of each direction, 12 of each ground.

    Of the six colours of a shape, direction and ground one is held out, so each word, and each two of them together,
    is seen in training.
    """

    def outside(scene: Scene) -> bool:
        color, direction = list(COLORS).index(scene.color), list(DIRECTIONS).index(scene.direction)
        shape, ground = SHAPES.index(scene.shape), list(BACKGROUNDS).index(scene.background)
        return (color - shape - direction) % 6 == 3 * ((direction + ground) % 2)

    return tuple(scene for scene in scenes() if outside(scene))


def training_scenes() -> tuple[Scene, ...]:
    """The 120 scenes that are not held out."""
    outside = frozenset(held_out())
    return tuple(scene for scene in scenes() if scene not in outside)


def parse(prompt: str) -> Scene:
    """The scene that a prompt asks for.

    Args:
        prompt: A sentence of the form of `Scene.prompt`.

    Raises:
        ValueError: another sentence, or an unknown word in it.
    """
    found = re.fullmatch(r"a (\w+) (\w+) moving (\w+) on a (\w+) background", prompt)
    if found is None:
        example = scenes()[0].prompt
        raise ValueError(f"prompt must have the form {example!r} with words of vsparse.measure.shapes, got {prompt!r}")
    color, shape, direction, background = found.groups()
    return Scene(color=color, shape=shape, direction=direction, background=background)


@dc.dataclass(frozen=True, kw_only=True)
class _Chance:
    """What is left open by a scene: size, path and ground of one clip."""

    radius: float
    start: Sequence[float]
    step: Sequence[float]  # from the first frame to the last
    ground: Sequence[float]
    slope: Sequence[float]  # from the middle to the right border and to the lower one


def _chance(scene: Scene, seed: int, index: int) -> _Chance:
    """Drawn from numbers of this clip alone, the same for every scene."""
    numbers = random.Random(f"{seed} {index}")
    radius, travel = numbers.uniform(*RADII), numbers.uniform(*TRAVELS)
    across, up, down = (radius * reach + MARGIN for reach in _REACH[scene.shape])
    start, step = [], []
    for (before, after), sign in zip(((across, across), (up, down)), DIRECTIONS[scene.direction], strict=True):
        free = 1 - before - after - travel * abs(sign)
        first = before + numbers.random() * free
        start.append(first + travel if sign < 0 else first)
        step.append(sign * travel)
    level = numbers.uniform(*BACKGROUNDS[scene.background])
    ground = [level + numbers.uniform(-TINT, TINT) for _ in range(3)]
    sloped = numbers.random() >= PLAIN
    slope = [numbers.uniform(-SLOPE, SLOPE) * sloped for _ in range(2)]
    return _Chance(radius=radius, start=start, step=step, ground=ground, slope=slope)


def distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How far a point lies outside a shape; negative inside, exact along its sides.

    Args:
        shape: One of `SHAPES`. x, y: Float offsets from its centre of mass, y downwards. radius: Of the circle of the
            same area; all three broadcast.

    Returns:
        Distances in the unit of `x`.
    """
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - _SQUARE * radius
    return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - _TRIANGLE * radius


def draw(scenes: Sequence[Scene], *, seed: int, first: int = 0, size: int = 128, frames: int = 9) -> Tensor:
    """Clips of scenes: a shape moves at constant speed, always inside, over a plain or evenly graded ground.

    Args:
        scenes: What each clip shows.
        seed: Of size, path and ground of the clips.
        first: Number of the first clip: clip `i` of a call is clip `first + i` of the seed and does not depend on the
            others.
        size: Height and width in pixels. frames: Number of frames; the last shows the whole way.

    Returns:
        float32 `[B, 3, F, H, W]` in [-1, 1], as the VAEs of diffusers take them; edges are antialiased.

    Raises:
        ValueError: no scenes, or a size or number of frames below one.
    """
    if not scenes or size < 1 or frames < 1:
        raise ValueError(f"draw needs scenes, size >= 1 and frames >= 1, got {len(scenes)} scenes, {size=}, {frames=}")
    chances = [_chance(scene, seed, first + i) for i, scene in enumerate(scenes)]

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(chance, name) for chance in chances])

    time = torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1)
    center = column("start")[:, None] + time[:, None] * column("step")[:, None]  # [B, F, 2]
    axis = (torch.arange(size) + 0.5) / size
    x, y = axis - center[..., 0, None, None], axis[:, None] - center[..., 1, None, None]
    radius = column("radius")
    outside = torch.empty(len(scenes), frames, size, size)
    for shape in SHAPES:
        mine = torch.tensor([scene.shape == shape for scene in scenes])
        outside[mine] = distance(shape, x[mine], y[mine], radius[mine, None, None, None])
    mask = (0.5 - outside * size).clamp(0, 1)[:, None]
    slope = column("slope")
    ramp = slope[:, 0, None, None] * (2 * axis - 1) + slope[:, 1, None, None] * (2 * axis[:, None] - 1)
    ground = (column("ground")[:, :, None, None] + ramp[:, None]).clamp(0, 1)[:, :, None]
    color = torch.tensor([COLORS[scene.color] for scene in scenes])[:, :, None, None, None]
    return torch.lerp(ground, color, mask) * 2 - 1
