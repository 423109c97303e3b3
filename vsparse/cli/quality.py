"""``vsparse quality``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from vsparse.cli.arguments import (
    MACHINE,
    SPARSITY,
    VIDEO,
    DenseLayers,
    DenseSteps,
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    Offload,
    OwnModel,
    SearchAt,
    Steps,
    Width,
)
from vsparse.cli.common import console, plainly, quiet, told_bar, typer

__all__ = ["quality"]

FOLDERS = "Videos that are there already"


@plainly
def quality(
    model: OwnModel = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", metavar="KEY", help="Or a profile; repeatable; adaspa if none.", rich_help_panel=SPARSITY
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="[KEY.]NAME=VALUE",
            help="An option of every method, or with KEY of one; repeatable.",
            rich_help_panel=SPARSITY,
        ),
    ] = None,
    dense_steps: DenseSteps = None,
    dense_layers: DenseLayers = None,
    search_at: SearchAt = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="What to show; repeatable.", rich_help_panel=VIDEO),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A prompt in each line, or VBench's JSON.", rich_help_panel=VIDEO),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Clips of each prompt (1).", rich_help_panel=VIDEO)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="The first seed (0).", rich_help_panel=VIDEO)
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    fps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the mp4.", rich_help_panel=VIDEO)] = None,
    videos: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="DENSE SPARSE", help="Two folders, paired by file name.", rich_help_panel=FOLDERS),
    ] = None,
    floor: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Dense by another exact kernel.", rich_help_panel=FOLDERS),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="For videos and report.", rich_help_panel=MACHINE)
    ] = Path("out/quality"),
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = False,
) -> None:
    """Say how far sparse videos lie from dense ones of the same prompt and seed, next to a floor of exactness.

    `vsparse quality -m adaspa -m vsa -s density=0.5 -s block=16 -s vsa.tile=1x4x4`

    `vsparse quality ./my-wan -m adaspa --prompts prompts.txt --seeds 2 --height 480 --width 832 --frames 81`

    `vsparse quality --videos out/dense out/sparse`
    """
    from vsparse.measure import options
    from vsparse.measure.fidelity import folders, report, tables
    from vsparse.measure.fidelity.rounds import Subject
    from vsparse.measure.video import check_folder
    from vsparse.methods import Method

    if videos is not None:
        generating = {
            "MODEL": model, "--method": method, "--set": settings, "--dense-steps": dense_steps,
            "--dense-layers": dense_layers, "--search-at": search_at, "--prompt": prompt, "--prompts": prompts,
            "--seeds": seeds, "--seed": seed, "--height": height, "--width": width, "--frames": frames,
            "--steps": steps, "--guidance": guidance, "--fps": fps, "--dtype": dtype, "--device": device,
            "--offload": offload or None,
        }  # fmt: skip
        if stray := [name for name, value in generating.items() if value is not None]:
            raise ValueError(f"--videos generates nothing: leave out {', '.join(stray)}")
        folder = check_folder(out)
        with told_bar() as told:
            found = folders.compared(*videos, floor=floor, told=told)
    else:
        if floor is not None:
            raise ValueError("--floor goes with --videos; where videos are made, the floor is made, too")
        chosen = options.methods(method or ["adaspa"], settings or [])
        subjects = [
            Subject(
                name=one.key if isinstance(one, Method) else one.name,
                method=one,
                schedule=options.schedule(one, dense_steps, dense_layers, search_at),
            )
            for one in chosen
        ]
        texts = report.prompts_of(model, prompt or [], prompts)
        size = {"height": height, "width": width, "frames": frames, "steps": steps, "guidance": guidance}
        folder = check_folder(out)
        quiet()
        with told_bar() as told:
            found = report.quality_of(
                model, subjects, texts, size, folder=folder, seeds=seeds or 1, first=seed or 0, fps=fps, dtype=dtype,
                device=device, offload=offload, told=told,
            )  # fmt: skip
    console.print(tables.ran_table(found))
    console.print(tables.figures_table(found))
    for line in tables.sentences(found):
        console.print(line, highlight=False, markup=False)
    for line in tables.left_out(found):
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for path in report.write(folder, found):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
