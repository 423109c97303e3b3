"""The measure of adherence: right on drawn clips, also on blurred and noisy ones, false on each way to spoil one."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vsparse.measure.adherence import PROPERTIES, Adherence, adherence, summary
from vsparse.measure.shapes import COLORS, Scene, draw, scenes

SIZE = 64
SOME = scenes()[::7]  # 7 divides none of the numbers of words: every word comes
ALL_TRUE = dict.fromkeys(PROPERTIES, True)


def measure(scene: Scene, clip: Tensor) -> Adherence:
    return adherence((clip / 2 + 0.5).clamp(0, 1).movedim(0, -1), scene)


def verdict(result: Adherence) -> dict[str, bool]:
    return {name: getattr(result, name) for name in PROPERTIES}


def judged(asked: tuple[Scene, ...], spoil: Callable[[Tensor], Tensor], **size: int) -> list[Adherence]:
    clips = draw(asked, seed=1, **{"size": SIZE, **size})
    return [measure(scene, spoil(clip)) for scene, clip in zip(asked, clips, strict=True)]


def blurred(clip: Tensor, cells: float) -> Tensor:
    """Gaussian blur; its width in 32nds of the picture."""
    sigma = cells * clip.shape[-1] / 32
    reach = int(3 * sigma)
    kernel = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(clip.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[None, None, :, None])
    return F.conv2d(rows, kernel[None, None, None]).view_as(clip)


def noisy(clip: Tensor, decibel: float) -> Tensor:
    """Noise that alone gives this PSNR."""
    generator = torch.Generator().manual_seed(0)
    return clip + 2 * 10 ** (-decibel / 20) * torch.randn(clip.shape, generator=generator)


def ground(clip: Tensor) -> Tensor:
    """A picture of the colour that most of each frame has."""
    return clip.flatten(2).median(-1).values[..., None, None].expand_as(clip)


def test_every_drawn_scene_is_seen_as_it_is() -> None:
    for result, scene in zip(judged(scenes(), lambda clip: clip), scenes(), strict=True):
        assert verdict(result) == ALL_TRUE, scene
        assert result.follows


def test_the_size_of_the_embedded_model() -> None:
    results = judged(scenes()[::29], lambda clip: clip, size=128)
    assert summary(results) == {**dict.fromkeys((*PROPERTIES, "follows"), 5), "clips": 5}


def test_what_a_vae_leaves_of_a_clip_is_still_recognised() -> None:
    """28 dB of noise on top of a blur by half a latent cell of 16."""
    assert [verdict(result) for result in judged(SOME, lambda clip: noisy(blurred(clip, 0.5), 28))] == [ALL_TRUE] * len(
        SOME
    )


@pytest.mark.parametrize("word", ["color", "shape", "direction", "background"])
def test_another_word_is_noticed_and_no_other_property_suffers(word: str) -> None:
    words = sorted({getattr(scene, word) for scene in scenes()})
    for i, (scene, clip) in enumerate(zip(SOME, draw(SOME, seed=1, size=SIZE), strict=True)):
        asked = dc.replace(scene, **{word: words[i % len(words)]})
        assert verdict(measure(asked, clip)) == {**ALL_TRUE, word: asked == scene}


SPOILED: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "reversed in time": (lambda clip: clip.flip(1), {"direction"}),
    "frozen": (lambda clip: clip[:, :1].expand_as(clip), {"direction", "coherent"}),
    "two frames exchanged": (lambda clip: clip[:, [0, 1, 2, 6, 4, 5, 3, 7, 8]], {"coherent"}),
    "a frame twice": (lambda clip: clip[:, [0, 1, 2, 3, 3, 5, 6, 7, 8]], {"coherent"}),
    "no object in a frame": (lambda clip: torch.cat((clip[:, :4], ground(clip)[:, :1], clip[:, 5:]), 1), {"coherent"}),
    "no object": (ground, {"color", "shape", "direction", "coherent"}),
    "upside down": (lambda clip: clip.flip(2), {"direction", "shape"}),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_clip_loses_the_properties_it_should(name: str) -> None:
    spoil, lost = SPOILED[name]
    for scene, result in zip(SOME, judged(SOME, spoil), strict=True):
        expected = set(lost)
        if name == "upside down":  # the mirror image of a circle or square is one, and of a way to the side as well
            expected -= {"shape"} if scene.shape != "triangle" else set()
            expected -= {"direction"} if scene.direction in ("left", "right") else set()
        assert {word for word, true in verdict(result).items() if not true} == expected, scene


@pytest.mark.parametrize("value", [-0.8, 0.7])
def test_a_constant_video_shows_nothing_but_a_background(value: float) -> None:
    result = measure(SOME[0], torch.full((3, 9, SIZE, SIZE), value))
    assert result.seen == ("none", "none", "none", "light" if value > 0 else "dark")
    assert verdict(result) == {**dict.fromkeys(PROPERTIES, False), "background": result.background}


def test_noise_follows_no_prompt() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((3, 9, SIZE, SIZE), generator=generator) * 2 - 1
    for scene in SOME:
        result = measure(scene, noise)
        assert not any((result.shape, result.direction, result.coherent))


@pytest.mark.parametrize("color", COLORS)
def test_a_second_object_is_incoherent(color: str) -> None:
    """Half as wide as a latent cell is let pass, twice as wide is not."""
    for scene, clip in zip(SOME, draw(SOME, seed=1, size=SIZE), strict=True):
        if scene.color == color:
            continue
        empty = (clip - ground(clip)).abs().amax((0, 1)) < 0.5  # plain ground in all frames
        for side, fine in ((SIZE // 32, True), (SIZE // 8, False)):
            room = -F.max_pool2d(-empty[None, None].float(), side + 2, 1)[0, 0]
            top, left = (int(i) + 1 for i in room.nonzero()[0])
            spoiled = clip.clone()
            spoiled[:, 5, top : top + side, left : left + side] = (torch.tensor(COLORS[color]) * 2 - 1)[:, None, None]
            assert measure(scene, spoiled).coherent == fine


def test_frames_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="frames must be float frames"):
        adherence(torch.zeros(3, 9, 64, 64), SOME[0])
    with pytest.raises(ValueError, match="at least two of at least 16x16"):
        adherence(torch.zeros(1, 64, 64, 3), SOME[0])
