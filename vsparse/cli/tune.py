"""``vsparse tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from vsparse.cli.arguments import (
    SPARSITY,
    VIDEO,
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    OwnModel,
    Settings,
    Steps,
    Width,
)
from vsparse.cli.common import console, plainly, progress_bar, quiet, typer

__all__ = ["tune"]

TARGET = "Target (one of three)"


@plainly
def tune(
    model: OwnModel = None,
    density: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Executed share of all token pairs, at most.", rich_help_panel=TARGET),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(metavar="E", help="Relative error of the last latents, at most.", rich_help_panel=TARGET),
    ] = None,
    latency: Annotated[
        float | None, typer.Option(metavar="S", help="Seconds of a generation, at most.", rich_help_panel=TARGET)
    ] = None,
    method: Annotated[
        list[str],
        typer.Option(
            "--method", "-m", metavar="KEY", help="A candidate; repeatable. None: four.", rich_help_panel=SPARSITY
        ),
    ] = [],  # noqa: B006 (typer copies it)
    settings: Settings = [],  # noqa: B006
    dense_steps: Annotated[
        str | None,
        typer.Option(metavar="SHARE,SHARE", help="Dense steps to try (0,0.1,0.2,0.3).", rich_help_panel=SPARSITY),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts to search with, one a line.", rich_help_panel=VIDEO)
    ] = None,
    unseen: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="To verify with (half of --prompts).", rich_help_panel=VIDEO),
    ] = None,
    clips: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of each kind, with the embedded model.", rich_help_panel=VIDEO)
    ] = 8,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="First frame of all clips, for image-to-video.", rich_help_panel=VIDEO),
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The profile (profile.toml among the reports).")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="For reports and what is found on the way.")
    ] = Path("out/tune"),
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Find a method, its dense steps and a density for each layer and head; writes a profile. Stopped, it goes on.

    `vsparse tune --density 0.3`

    `vsparse tune ./my-wan --error 0.2 --prompts prompts.txt --height 480 --width 832 --frames 81 --steps 50`
    """
    from vsparse.measure import options
    from vsparse.measure.embedded import opened
    from vsparse.measure.fidelity.vbench import read_prompts
    from vsparse.measure.tune import page, run
    from vsparse.measure.tune.search import DENSE_STEPS, Target
    from vsparse.measure.video import check_folder

    wanted = Target(density=density, error=error, seconds=latency)
    folder = check_folder(out)
    file = folder / "profile.toml" if profile is None else profile
    if file.suffix != ".toml":
        raise ValueError(f"--profile must end in .toml, got {str(file)!r}")
    chosen = run.candidates(method, options.settings(settings), small=model is None)
    if model is None:
        if prompts is not None or unseen is not None:
            raise ValueError("--prompts and --unseen go with a MODEL; the embedded one knows its own scenes only")
        scenes = run.embedded_clips(clips, clips)
    elif prompts is None:
        raise ValueError("give --prompts, a file with one prompt a line, to search and to verify with")
    else:
        scenes = run.split(read_prompts(prompts), [] if unseen is None else read_prompts(unseen))
    quiet()
    with console.status("loading the pipeline"):
        pipe, clip = opened(model, dtype=dtype, device=device)
    given = {"height": height, "width": width, "frames": frames, "steps": steps, "guidance": guidance}
    size = {**clip, **{name: value for name, value in given.items() if value is not None}}
    if image is not None:
        size["image"] = str(image)
    shares = DENSE_STEPS if dense_steps is None else options.shares(dense_steps, "--dense-steps")
    with progress_bar() as progress:
        task = progress.add_task("", total=None)

        def told(words: str) -> None:
            progress.update(task, description=words[:70].ljust(70), advance=1)

        result = run.tune(pipe, chosen, wanted, scenes, size, folder, dense_steps=shares, told=told)
    console.print(page.tried_table(result))
    console.print(page.verified_table(result))
    for words in result.verdicts:
        console.print(words, highlight=False)
    for path in run.write(result, folder, file):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
