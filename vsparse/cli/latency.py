"""``vsparse latency``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

from vsparse.cli.arguments import (
    MACHINE,
    VIDEO,
    DenseLayers,
    DenseSteps,
    Device,
    Dtype,
    Frames,
    Height,
    MethodKey,
    OwnModel,
    SearchAt,
    Settings,
    Shared,
    Steps,
    Width,
)
from vsparse.cli.common import console, plainly, quiet, told_bar, typer

__all__ = ["latency"]


@plainly
def latency(
    model: OwnModel = None,
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help='One attention layer: "Wan 2.1 14B, 720p", or a transformer\'s class name and a size.'
        ),
    ] = None,
    method: MethodKey = "adaspa",
    settings: Settings = [],  # noqa: B006 (typer copies it)
    dense_steps: DenseSteps = None,
    dense_layers: DenseLayers = None,
    search_at: SearchAt = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="What to show (a red circle).", rich_help_panel=VIDEO),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Seed of the noise (0).")] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    seconds: Annotated[float | None, typer.Option(metavar="S", min=0, help="About how long to measure (60).")] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Rounds, instead; a median needs 6 for its interval.")
    ] = None,
    fresh_rates: Annotated[
        bool, typer.Option("--fresh-rates", help="Measure the rates of this machine anew.", rich_help_panel=MACHINE)
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="For the report.")] = Path("out/latency"),
    dtype: Dtype = None,
    device: Device = None,
    context_parallel: Shared = None,
) -> None:
    """Say where the time of a generation goes, dense and sparse, measured in turn in one run.

    `vsparse latency --method vsa -s density=0.25 -s tile=1x8x8`

    `vsparse latency --layer "Wan 2.1 14B, 720p" -m vsa -s density=0.1`

    `vsparse latency ./my-wan -m adaspa --height 480 --width 832 --frames 81 --steps 50 --rounds 6`

    `torchrun --nproc-per-node 2 -m vsparse latency -m vsa -s density=0.25 --context-parallel ulysses=2`
    """
    from vsparse.measure import options
    from vsparse.measure.drawing import PROMPT
    from vsparse.measure.embedded import opened
    from vsparse.measure.latency import report, tables
    from vsparse.measure.video import check_folder
    from vsparse.methods import Method
    from vsparse.parallel.context import ContextParallel, parse
    from vsparse.parallel.launch import joined

    folder = check_folder(out)
    chosen = options.asked(method, settings)
    schedule = options.schedule(chosen, dense_steps, dense_layers, search_at)
    size = {"height": height, "width": width, "frames": frames}
    quiet()
    if layer is not None:
        if model is not None:
            raise ValueError(f"give MODEL or --layer, not both; got {model!r} and {layer!r}")
        if not isinstance(chosen, Method):
            raise ValueError(f"--layer measures one layer with one method; {method} is a profile: give a registry key")
        of_videos = {
            "--prompt": prompt,
            "--seed": seed,
            "--steps": steps,
            "--seconds": seconds,
            "--dense-steps": dense_steps,
            "--dense-layers": dense_layers,
            "--search-at": search_at,
            "--context-parallel": context_parallel,
        }
        if stray := [name for name, value in of_videos.items() if value is not None]:
            raise ValueError(f"--layer measures single calls, without a generation: leave out {', '.join(stray)}")
        with told_bar() as began:
            one = report.one_layer(
                layer, chosen, size=size, dtype=dtype, device=device, rounds=rounds, again=fresh_rates, began=began
            )
        console.print(tables.layer_table(one))
        if one.measured is not None:
            console.print(tables.baselines_table(one.measured))
            for words in tables.refused_lines(one.measured):
                console.print(words, highlight=False, markup=False)
        for words in one.verdicts():
            console.print(f"{words}.", highlight=False)
        if one.refused:
            console.print(one.refused, style="yellow", highlight=False)
        for path in report.write_layer(folder, one):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
        return
    shared = parse(context_parallel) if context_parallel else None
    if shared is not None and seconds is not None:
        raise ValueError("--seconds lets each process count for itself; with --context-parallel give --rounds")
    with contextlib.ExitStack() as stack:
        rank, own_device = stack.enter_context(joined(shared or ContextParallel()))
        console.quiet = rank > 0  # the others do the same work in silence
        with console.status("loading the pipeline"):
            pipe, clip = opened(model, dtype=dtype, device=device or own_device, steps=report.STEPS)
        given = {**size, "steps": steps}
        began = stack.enter_context(told_bar())
        found = report.measured(
            pipe,
            chosen,
            schedule,
            {**clip, **{name: value for name, value in given.items() if value is not None}},
            prompt=PROMPT if prompt is None else prompt,
            seed=seed or 0,
            seconds=60.0 if seconds is None else seconds,
            rounds=rounds,
            again=fresh_rates,
            began=began,
            parallel=shared,
        )
    if rank > 0:
        return
    for make in (tables.whole_table, tables.parts_table, tables.phases_table, tables.predicted_table):
        console.print(make(found))
    for line in tables.sentences(found):
        console.print(line, highlight=False)
    for path in report.write(folder, found):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
