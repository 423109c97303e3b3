"""Whether a clip shows the scene that its prompt asked for, measured in the picture.

No limit here is chosen by hand; each follows from the scenes of `vsparse.measure.shapes`:

- A pixel belongs to the object if it is nearer, in RGB, to one of the six colours than to the ground of its frame: the
  surface half-way between them. The ground is a plane fitted to what is not object, because grounds are graded evenly.
- Colour: the one that most pixels of the object have. Background: the two ranges of grey are told apart half-way
  between them.
- Shape: each of the three, drawn with the measured area at the measured centre of mass, is laid over the object; the
  one that agrees best (intersection over union, mean over the frames with an object) is the shape. It is none of them
  if it agrees less than the two most similar shapes agree with each other.
- Direction: a line is fitted to the centres of mass over time, and the axis nearest to it counts. It is none if the way
  is shorter than half the shortest way of a scene, which is half-way between a scene and a still picture.
- Coherent: in each frame an object, and outside it less foreground than one latent cell, the smallest thing that the
  model can place; the area between half the smallest and twice the largest of a scene, its largest and smallest in
  the clip no further apart than those of two clips may be; each step from frame to frame nearer to the mean step than
  to standing still or going twice as far.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vsparse.measure.quality import check_frames
from vsparse.measure.shapes import BACKGROUNDS, COLORS, DIRECTIONS, RADII, SHAPES, TRAVELS, Scene, distance

__all__ = ["Adherence", "adherence", "summary"]

PROPERTIES = ("color", "shape", "direction", "background", "coherent")
CELL = 1 / 16  # width of a latent cell of the embedded model, in widths of the picture


@dc.dataclass(frozen=True, kw_only=True)
class Adherence:
    """What of a scene a clip shows.

    Args:
        color, shape, direction, background: Whether each is what the scene says.
        coherent: Whether one object of steady size is there in every frame and moves steadily; whatever it is.
        seen: The words for what was measured, in the order of the first four; "none" where there is none of them.
        overlap: Agreement with the best shape, intersection over union, mean over the frames that hold an object.
        travel: Way from the first to the last frame, from the fitted line, in widths of the picture.
    """

    color: bool
    shape: bool
    direction: bool
    background: bool
    coherent: bool
    seen: tuple[str, str, str, str]
    overlap: float
    travel: float

    @property
    def follows(self) -> bool:
        """Whether colour, shape, direction and background are all as the scene says; coherence is another matter."""
        return self.color and self.shape and self.direction and self.background

    @property
    def right(self) -> int:
        """How many of the five properties hold."""
        return sum(getattr(self, name) for name in PROPERTIES)


def adherence(frames: Tensor, scene: Scene) -> Adherence:
    """Measure a clip against the scene of its prompt.

    Args:
        frames: Float frames `[F, H, W, 3]` in [0, 1], at least two, at least 16 pixels high and wide.
        scene: What the clip should show.

    Raises:
        ValueError: the frames are something else.
    """
    check_frames("frames", frames)
    if frames.shape[0] < 2 or min(frames.shape[1:3]) < 1 / CELL:
        raise ValueError(f"frames must be at least two of at least 16x16 pixels, got {tuple(frames.shape)}")
    pixels = frames.detach().to("cpu", torch.float32).movedim(-1, 1)
    label, ground = _segment(pixels)
    objects, stray = _largest(label > 0)
    track = _Track.of(objects)
    color = _color(label, objects)
    shape, overlap = _shape(objects, track)
    direction, travel = _direction(track)
    low, high = BACKGROUNDS.values()
    background = list(BACKGROUNDS)[int(ground > (low[1] + high[0]) / 2)]
    seen = (color, shape, direction, background)
    asked = (scene.color, scene.shape, scene.direction, scene.background)
    right = [ours == theirs for ours, theirs in zip(seen, asked, strict=True)]
    return Adherence(
        color=right[0], shape=right[1], direction=right[2], background=right[3],
        coherent=_coherent(track, stray), seen=seen, overlap=overlap, travel=travel,
    )  # fmt: skip


def summary(results: Sequence[Adherence]) -> dict[str, int]:
    """How many of the clips show each property, all four of the scene (`follows`), and how many `clips` there are."""
    counts = {name: sum(getattr(result, name) for result in results) for name in (*PROPERTIES, "follows")}
    return {**counts, "clips": len(results)}


def _segment(pixels: Tensor) -> tuple[Tensor, float]:
    """Label of each pixel of `[F, 3, H, W]`, 0 for ground or 1 + number of the colour; mean level of the ground."""
    count, _, height, width = pixels.shape
    values = pixels.flatten(2)  # [F, 3, N]
    palette = torch.tensor(list(COLORS.values()))[..., None]
    to_color, color = torch.stack([(values - rgb).square().sum(1) for rgb in palette]).min(0)
    y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width).expand(height, width)
    basis = torch.stack((torch.ones(height, width), x, y)).flatten(1)
    ground = values.median(-1, keepdim=True).values.expand_as(values)  # the object takes less than half of a frame
    for _ in range(3):  # a plane through what is ground, twice refined by the plane itself
        free = (values - ground).square().sum(1) < to_color
        weighted = basis * free[:, None]
        normal = weighted @ basis.T + 1e-3 * torch.eye(3)  # a plane even where nothing is ground
        ground = torch.linalg.solve(normal, weighted @ values.mT).mT @ basis
    level = float((values.mean(1) * free).sum() / free.sum().clamp_min(1))
    return torch.where(free, 0, color + 1).view(count, height, width), level


def _largest(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The largest connected part of each frame of `[F, H, W]`, and the foreground outside it as a share of the frame.

    Each pixel takes the highest number among its eight neighbours of the foreground until none changes.
    """
    count, height, width = mask.shape
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(height, width) * mask  # exact below 2^24
    while True:
        spread = F.max_pool2d(numbers[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, numbers):
            break
        numbers = spread
    parts = numbers.long().flatten(1)
    sizes = torch.zeros(count, height * width + 1, dtype=torch.long).scatter_add_(1, parts, mask.flatten(1).long())
    size, largest = sizes.max(1)
    part = (parts == largest[:, None]).view_as(mask) & mask
    return part, (mask.flatten(1).sum(1) - size) / (height * width)


@dc.dataclass(frozen=True)
class _Track:
    """Area and centre of mass of the object in each frame, in widths of the picture."""

    area: Tensor  # [F]
    center: Tensor  # [F, 2], x then y; zero where there is no object
    axes: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, objects: Tensor) -> _Track:
        height, width = objects.shape[1:]
        x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
        weight = objects.float()
        total = weight.sum((1, 2)).clamp_min(1)
        center = torch.stack(((weight * x).sum((1, 2)) / total, (weight * y[:, None]).sum((1, 2)) / total), -1)
        return cls(weight.mean((1, 2)), center, (x, y))

    @property
    def held(self) -> Tensor:
        """Which frames hold an object."""
        return self.area > 0


def _color(label: Tensor, objects: Tensor) -> str:
    votes = Counter(label[objects].tolist())
    return list(COLORS)[votes.most_common(1)[0][0] - 1] if votes else "none"


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp_min(1)


def _placed(shape: str, area: Tensor, center: Tensor, axes: tuple[Tensor, Tensor]) -> Tensor:
    """A shape of each area at each centre, `[F, H, W]`."""
    x, y = axes[0] - center[:, 0, None, None], axes[1][:, None] - center[:, 1, None, None]
    return distance(shape, x, y, (area / math.pi).sqrt()[:, None, None]) < 0


@functools.cache
def _closest_shapes() -> float:
    """How well the two most similar shapes of one area and centre agree, at the size of the embedded model."""
    axis = (torch.arange(128) + 0.5) / 128
    area, center = torch.tensor([math.pi * sum(RADII) ** 2 / 4]), torch.tensor([[0.5, 0.5]])
    drawn = [_placed(shape, area, center, (axis, axis)) for shape in SHAPES]
    return max(float(_overlap(a, b)) for a, b in itertools.combinations(drawn, 2))


def _shape(objects: Tensor, track: _Track) -> tuple[str, float]:
    held = track.held
    if not held.any():
        return "none", 0.0
    placed = {shape: _placed(shape, track.area[held], track.center[held], track.axes) for shape in SHAPES}
    agreed = {shape: float(_overlap(objects[held], mask).mean()) for shape, mask in placed.items()}
    best = max(agreed, key=lambda shape: agreed[shape])
    return (best if agreed[best] > _closest_shapes() else "none"), agreed[best]


def _direction(track: _Track) -> tuple[str, float]:
    held = track.held
    if held.sum() < 2:
        return "none", 0.0
    time = torch.linspace(0, 1, len(held))[held]
    late = time - time.mean()
    way = late @ track.center[held] / late.square().sum()
    travel = float(way.norm())
    along = {name: float(way @ torch.tensor(sign, dtype=way.dtype)) for name, sign in DIRECTIONS.items()}
    return (max(along, key=lambda name: along[name]) if travel >= TRAVELS[0] / 2 else "none"), travel


def _coherent(track: _Track, stray: Tensor) -> bool:
    if not track.held.all() or bool((stray >= CELL**2).any()):
        return False
    smallest, largest = (math.pi * radius**2 for radius in RADII)
    low, high = (float(value) for value in track.area.aminmax())
    if low < smallest / 2 or high > 2 * largest or high / low > largest / smallest:
        return False
    steps = track.center.diff(dim=0)
    mean = steps.mean(0)
    moves = float(mean.norm()) * len(steps) >= TRAVELS[0] / 2
    return moves and bool(((steps - mean).norm(dim=-1) <= mean.norm() / 2).all())
