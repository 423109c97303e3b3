"""Videos: written whole, read back, and refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vsparse.measure import video
from vsparse.measure.quality import compare


def clip(frames: int = 5, height: int = 32, width: int = 48) -> torch.Tensor:
    """Three bars of grey that move: smooth in colour, so that H.264's colour subsampling does not matter."""
    time = torch.linspace(0, 1, frames)[:, None, None]
    across = torch.linspace(0, 3, width)[None, None]
    return (0.5 + 0.4 * torch.sin(2 * (across + time))).expand(frames, height, width)[..., None].repeat(1, 1, 1, 3)


def test_round_trip_and_enlargement(tmp_path: Path) -> None:
    frames = clip()
    written = video.write_video(tmp_path / "a.mp4", frames, fps=8, enlarge=2)
    back = video.read_video(written)
    assert back.shape == (5, 64, 96, 3)
    large = frames.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert compare(back, large).worst_psnr > 30
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = video.write_video(tmp_path / "a.mp4", clip())
    before = target.read_bytes()
    monkeypatch.setattr(video, "read_video", lambda path: torch.zeros(1, 2, 2, 3))
    with pytest.raises(RuntimeError, match="read back"):
        video.write_video(target, clip(frames=4))
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_output_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for path, complaint in (
        (tmp_path / "a.avi", "must end in .mp4"),
        (tmp_path / "file" / "a.mp4", "it is a file, not a folder"),
        (tmp_path / "file" / "deeper" / "a.mp4", "cannot write into the folder"),
        (tmp_path / "folder.mp4", "is a folder"),
        (Path("/proc/nothing/a.mp4"), "cannot write into the folder"),
    ):
        with pytest.raises(ValueError, match=complaint):
            video.check_output(path, ".mp4")


def test_output_check_makes_folders_and_leaves_no_probe(tmp_path: Path) -> None:
    assert video.check_output(tmp_path / "x" / "y" / "a.mp4", ".mp4").parent.is_dir()
    assert list((tmp_path / "x" / "y").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"fps": 0}, "fps"), ({"enlarge": 0}, "enlarge"), ({"fps": True}, "fps")],
)
def test_numbers_are_checked(tmp_path: Path, options: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        video.write_video(tmp_path / "a.mp4", clip(), **options)


def test_odd_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even sizes, got 31 x 48"):
        video.write_video(tmp_path / "a.mp4", clip(height=31))


def test_reading_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such video"):
        video.read_video(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_text("hello")
    with pytest.raises(ValueError, match="cannot read"):
        video.read_video(tmp_path / "a.mp4")
