"""Choosing frames and buckets by hand; scaling against its definition in float64."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from oracle import check
from torch import Tensor

from vsparse.training.data.buckets import Bucket, check_buckets, choose_bucket, fit_frames, source_frames


@pytest.mark.parametrize(
    ("fps", "wanted", "start", "frames"),
    [
        (24, None, 3, (3, 4, 5, 6, 7)),
        (16, 16, 0, (0, 1, 2, 3, 4)),
        (32, 16, 1, (1, 3, 5, 7, 9)),
        (24, 16, 0, (0, 2, 3, 5, 6)),  # 0, 1.5, 3, 4.5, 6
        (8, 16, 0, (0, 1, 1, 2, 2)),  # 0, 0.5, 1, 1.5, 2
    ],
)
def test_frames_nearest_in_time(fps: float, wanted: float | None, start: int, frames: tuple[int, ...]) -> None:
    assert source_frames(Bucket(frames=5, height=8, width=8, fps=wanted), fps=fps, start=start) == frames


@given(st.integers(1, 40), st.floats(1, 240), st.floats(1, 120), st.integers(0, 50))
def test_no_frame_is_nearer(frames: int, fps: float, wanted: float, start: int) -> None:
    taken = source_frames(Bucket(frames=frames, height=8, width=8, fps=wanted), fps=fps, start=start)
    assert len(taken) == frames
    assert taken[0] == start
    assert list(taken) == sorted(taken)
    for i, frame in enumerate(taken):
        exact = i * (fps / wanted)
        assert abs(frame - start - exact) <= min(abs(n - exact) for n in (math.floor(exact), math.ceil(exact)))


WIDE, LONG = Bucket(frames=9, height=48, width=80), Bucket(frames=17, height=48, width=80)
TALL, SLOW = Bucket(frames=9, height=80, width=48), Bucket(frames=33, height=80, width=48, fps=8)
LARGE = Bucket(frames=17, height=96, width=160)


@pytest.mark.parametrize(
    ("frames", "fps", "height", "width", "bucket"),
    [
        (40, 8, 480, 832, LARGE),  # aspect, then frames, then area
        (40, 8, 50, 80, LONG),
        (16, 8, 480, 832, WIDE),  # one frame short of the others
        (17, 8, 832, 480, TALL),
        (33, 8, 832, 480, SLOW),
        (33, 16, 832, 480, TALL),  # 33 frames at 8 of 16 are 65
        (65, 16, 832, 480, SLOW),
        (9, 8, 64, 64, WIDE),  # as far from one as from the other: the first
        (8, 8, 480, 832, None),
    ],
)
def test_the_bucket_of_a_clip(frames: int, fps: float, height: int, width: int, bucket: Bucket | None) -> None:
    buckets = [WIDE, TALL, SLOW, LONG, LARGE]
    assert choose_bucket(buckets, frames=frames, fps=fps, height=height, width=width) == bucket


def _scaled(x: Tensor, size: int) -> Tensor:
    """Antialiased linear scaling of the last axis by its definition: a triangle as wide as what it replaces."""
    width = x.shape[-1]
    scale = width / size
    centre = (torch.arange(size, dtype=x.dtype) + 0.5) * scale
    distance = (torch.arange(width, dtype=x.dtype) + 0.5 - centre[:, None]) / max(scale, 1.0)
    weight = (1 - distance.abs()).clamp(min=0)
    return x @ (weight / weight.sum(-1, keepdim=True)).T


def _fitted(frames: Tensor, bucket: Bucket, dtype: torch.dtype) -> Tensor:
    height, width = frames.shape[1:3]
    scale = max(bucket.height / height, bucket.width / width)
    rows, columns = max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))
    x = _scaled(_scaled(frames.permute(3, 0, 2, 1).to(dtype), rows).transpose(2, 3), columns)
    top, left = (rows - bucket.height) // 2, (columns - bucket.width) // 2
    return x[:, :, top : top + bucket.height, left : left + bucket.width] / 127.5 - 1


@given(st.tuples(*[st.integers(1, 23)] * 4), st.integers(0, 99))
def test_scaling_and_cutting_follow_the_definition(sizes: tuple[int, int, int, int], seed: int) -> None:
    height, width, *wanted = sizes
    frames = torch.randint(256, (2, height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    bucket = Bucket(frames=2, height=wanted[0], width=wanted[1])
    fitted = fit_frames(frames, bucket)
    assert fitted.shape == (3, 2, *wanted)
    assert bool((fitted.abs() <= 1).all())
    check("fitted", fitted, _fitted(frames, bucket, torch.float32), _fitted(frames, bucket, torch.float64))


def test_a_clip_that_fits_is_not_touched() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    exact = frames.permute(3, 0, 1, 2).double() / 127.5 - 1
    check("same size", fit_frames(frames, Bucket(frames=1, height=16, width=16)), exact.float(), exact)
    middle = fit_frames(frames, Bucket(frames=1, height=16, width=9))
    check("middle", middle, exact.float()[..., 3:12], exact[..., 3:12])


def test_frames_of_another_kind_are_refused() -> None:
    for frames in (torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"must be uint8 \[F, h, w, 3\]"):
            fit_frames(frames, WIDE)


@pytest.mark.parametrize("change", [{"frames": 0}, {"height": 2.0}, {"width": True}, {"fps": 0}, {"fps": math.inf}])
def test_a_bucket_of_odd_values_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"bucket: {next(iter(change))} must be"):
        Bucket(**{"frames": 1, "height": 1, "width": 1} | change)


def test_no_buckets_and_equal_buckets_are_refused() -> None:
    assert check_buckets([WIDE, TALL]) == (WIDE, TALL)
    with pytest.raises(ValueError, match="at least one"):
        check_buckets([])
    with pytest.raises(ValueError, match="each may stand there once"):
        check_buckets([Bucket(frames=1, height=8, width=8, fps=16), Bucket(frames=1, height=8, width=8, fps=16.0)])
