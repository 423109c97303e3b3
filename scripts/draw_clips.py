"""Draw a folder of clips with captions, for trying out `vsparse finetune`: `python scripts/draw_clips.py out/clips`.

Coloured shapes that move, in the size that the embedded model knows, drawn by a program.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import track

from vsparse.measure.demo import FPS
from vsparse.measure.embedded import EMBEDDED
from vsparse.measure.shapes import draw, training_scenes
from vsparse.measure.video import check_folder, write_video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder, known = check_folder(given.folder), training_scenes()
    for i in track(range(given.count), "drawing"):
        scene = known[i * 7 % len(known)]  # 7 and 120 have no common divisor: every scene before any comes again
        size, frames = EMBEDDED.height, EMBEDDED.frames
        clip = draw([scene], seed=given.seed, first=i, size=size, frames=frames)[0].movedim(0, -1) * 0.5 + 0.5
        write_video(folder / f"{i:04d}.mp4", clip.clamp(0, 1), fps=FPS)
        (folder / f"{i:04d}.txt").write_text(scene.prompt + "\n")


if __name__ == "__main__":
    main()
