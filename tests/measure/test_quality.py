"""PSNR and SSIM: known values, limits, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch

from vsparse.measure.quality import Quality, compare


def plain(value: float, frames: int = 2, size: int = 16) -> torch.Tensor:
    return torch.full((frames, size, size, 3), value)


def test_psnr_of_a_constant_offset() -> None:
    found = compare(plain(0.75), plain(0.5))
    assert found.psnr == pytest.approx(-20 * math.log10(0.25))
    assert found.worst_psnr == pytest.approx(found.psnr)


def test_ssim_of_two_constants_is_their_luminance_term() -> None:
    a, b, c = 0.75, 0.5, 0.01**2
    assert compare(plain(a), plain(b)).ssim == pytest.approx((2 * a * b + c) / (a * a + b * b + c))


def test_psnr_is_of_the_whole_clip_and_worst_of_one_frame() -> None:
    reference, video = plain(0.5), plain(0.5)
    video[1] += 0.25
    found = compare(video, reference)
    assert found.psnr == pytest.approx(-10 * math.log10(0.25**2 / 2))
    assert found.worst_psnr == pytest.approx(-20 * math.log10(0.25))
    assert found.worst_ssim < found.ssim < 1


def test_equal_videos_are_identical_and_fit_into_json() -> None:
    found = compare(plain(0.3), plain(0.3))
    assert found.identical
    assert found.ssim == pytest.approx(1)
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told["psnr"] is None
    assert told["identical"] is True
    assert not Quality(psnr=30.0, ssim=0.9, worst_psnr=20.0, worst_ssim=0.8).identical


@pytest.mark.parametrize(
    ("video", "complaint"),
    [
        (torch.zeros(2, 16, 16), "float frames"),
        (torch.zeros(2, 16, 16, 4), "float frames"),
        (torch.zeros(2, 16, 16, 3, dtype=torch.uint8), "float frames"),
        (plain(1.5), r"\[0, 1\]"),
        (plain(float("nan")), r"\[0, 1\]"),
        (plain(0.5, frames=3), "one shape"),
    ],
)
def test_refuses_what_it_cannot_compare(video: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        compare(video, plain(0.5))


def test_refuses_frames_smaller_than_the_window_of_ssim() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels"):
        compare(plain(0.5, size=8), plain(0.5, size=8))
