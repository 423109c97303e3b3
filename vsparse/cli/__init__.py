"""The ``vsparse`` command. Every command is thin: what it does lives in `vsparse.measure` and the library."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Annotated

from vsparse.cli import latency as latency_command
from vsparse.cli import profiles as profiles_command
from vsparse.cli import quality as quality_command
from vsparse.cli import tune as tune_command
from vsparse.cli.arguments import (
    INSIDE,
    SEE,
    SPARSITY,
    USE,
    VIDEO,
    AnyModel,
    Batch,
    DenseLayers,
    DenseSteps,
    Device,
    Dtype,
    Frames,
    GpuMemory,
    Gpus,
    Guidance,
    Height,
    Lenient,
    Links,
    MethodKey,
    Model,
    Offload,
    Rates,
    SearchAt,
    Seed,
    Settings,
    Shared,
    Steps,
    Width,
)
from vsparse.cli.common import Console, console, errors, flags, plainly, progress_bar, quiet, typer

__all__ = ["INSIDE", "SEE", "USE", "app", "console", "errors", "main"]

app = typer.Typer(
    name="vsparse",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the ``vsparse`` command."""
    app(prog_name="vsparse")


def _print_version(wanted: bool) -> None:
    if wanted:
        import vsparse

        console.print(f"vsparse {vsparse.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[  # noqa: ARG001 (its callback has done it)
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Sparse attention for the video diffusion transformers of diffusers.

    Attention in a video model compares every part of every frame with every other. vsparse lets the model compute only
    the parts that matter, in the pipeline that you already use, and takes itself out again without a trace.

    Start with **`vsparse demo`**: it needs no download and no GPU. Then, with a pipeline of your own:

    `vsparse plan WanTransformer3DModel --method adaspa --height 480 --width 832 --frames 81 --steps 50`

    `vsparse generate ./my-wan --prompt "a fox in the snow" --method adaspa --output fox.mp4`
    """
    flags["debug"] = debug


# ---- see it work -------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=SEE)
@plainly
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="For videos, contact sheet and report.")
    ] = Path("out"),
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="The model knows no other kind of sentence.")
    ] = "a red circle moving right on a dark background",
    methods: Annotated[str, typer.Option(metavar="KEY,KEY", help="Methods to try. Empty: all.")] = "",
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Denoising steps.")] = 12,
    frames: Annotated[int, typer.Option(metavar="N", min=1, help="The model was trained with 9.")] = 9,
) -> None:
    """Generate one clip dense and with every method, with a tiny model that comes along; no download, no GPU."""
    import dataclasses as dc

    from vsparse.measure import demo as work
    from vsparse.measure import tables
    from vsparse.measure.embedded import EMBEDDED, embedded_pipeline
    from vsparse.measure.video import check_folder

    folder = check_folder(out)
    keys = [key.strip() for key in methods.split(",") if key.strip()]
    wanted = [*work.trials(keys or None), *work.FLOORS]
    clip = dc.replace(EMBEDDED, steps=steps, frames=frames)
    with console.status("loading the embedded pipeline"):
        quiet()
        pipe = embedded_pipeline()
        pipe.set_progress_bar_config(disable=True)
    console.print(f"[bold]{type(pipe).__name__}[/bold], a stock diffusers pipeline; prompt: {prompt!r}, seed {seed}")
    with progress_bar() as progress:
        task = progress.add_task("", total=(1 + len(wanted)) * steps)
        runs = work.run_demo(
            pipe,
            clip,
            folder,
            prompt=prompt,
            seed=seed,
            wanted=wanted,
            began=lambda name: progress.update(task, description=name.ljust(28)),
            stepped=lambda: progress.advance(task),
        )
    console.print(tables.demo_table(runs))
    console.print(f"Videos, contact sheet [bold]{folder / 'sheet.png'}[/bold] and report.json are in {folder}/.")
    console.print(
        "What this does not show: speed. The model is tiny, and its 1 280 tokens are far below the length where sparse "
        "attention pays for its search. Nor does it show how a large model bears a density."
    )


# ---- use it ------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=USE)
@plainly
def generate(
    model: Model,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", metavar="TEXT", help="What to show; repeat it for several videos.")
    ],
    method: MethodKey = "adaspa",
    settings: Settings = [],  # noqa: B006 (typer copies it)
    dense_steps: DenseSteps = None,
    dense_layers: DenseLayers = None,
    search_at: SearchAt = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The mp4; of several prompts, numbered.")
    ] = Path("video.mp4"),
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What not to show.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="First frame, for image-to-video.")] = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    fps: Annotated[int, typer.Option(metavar="N", min=1, help="Of the mp4.", rich_help_panel=VIDEO)] = 16,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = False,
    lenient: Lenient = False,
    context_parallel: Shared = None,
) -> None:
    """Generate videos with any diffusers pipeline, its attention made sparse.

    `vsparse generate ./my-wan -p "a fox in the snow" -m adaspa -s density=0.3 --height 480 --width 832 --frames 81`

    One video on four GPUs: `torchrun --nproc-per-node 4 -m vsparse generate ... --context-parallel ulysses=2,ring=2`
    """
    from vsparse.measure import options, pipelines, tables
    from vsparse.measure.video import write_video
    from vsparse.parallel.context import ContextParallel, parse
    from vsparse.parallel.launch import joined
    from vsparse.patch import apply

    chosen = options.asked(method, settings)
    schedule = options.schedule(chosen, dense_steps, dense_layers, search_at)
    targets = pipelines.outputs(output, len(prompt))
    parallel = parse(context_parallel) if context_parallel else ContextParallel()
    quiet()
    with contextlib.ExitStack() as stack:
        rank, own_device = stack.enter_context(joined(parallel))
        console.quiet = rank > 0  # the others do the same work in silence
        with console.status(f"loading {model}"):
            pipe = pipelines.load_pipeline(model, dtype=dtype, device=device or own_device, offload=offload)
            pipe.set_progress_bar_config(disable=True)
        patch = stack.enter_context(apply(pipe, chosen, schedule=schedule, parallel=parallel, strict=not lenient))
        console.print(f"{type(pipe).__name__}: {len(patch.plan.sites)} attention layers, {chosen}")
        for text, target in zip(prompt, targets, strict=True):
            with progress_bar() as progress:
                task = progress.add_task(text[:60], total=steps)
                video = pipelines.generate(
                    pipe,
                    prompt=text,
                    seed=seed,
                    height=height,
                    width=width,
                    frames=frames,
                    steps=steps,
                    guidance=guidance,
                    negative_prompt=negative_prompt,
                    image=image,
                    stepped=functools.partial(progress.advance, task),
                )
            if rank == 0:
                console.print(f"wrote {write_video(target, video, fps=fps)}")
        console.print(tables.stats_table(patch.stats()))


@app.command(rich_help_panel=USE)
@plainly
def finetune(
    settings: Annotated[Path | None, typer.Argument(metavar="FILE", help="Settings, TOML or YAML.")] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a file that explains every setting.")] = False,
    predict: Annotated[bool, typer.Option("--predict", help="Say what memory and time it will need.")] = False,
) -> None:
    """Train a model with sparse attention on your videos; the same command goes on with a run that was stopped.

    On several GPUs: `accelerate launch -m vsparse finetune run.toml`.
    """
    from vsparse.training import finetune as work
    from vsparse.training import settings_file

    if example:
        print(settings_file.example(), end="")  # noqa: T201 (for a file: no markup, no wrapping)
        return
    if settings is None:
        raise ValueError("give a settings file; `vsparse finetune --example` prints one to start from")
    told = settings_file.read(settings)
    if predict:
        from vsparse.training import predict_report

        quiet()
        with console.status("running a step without values"):
            tables = predict_report.tables(told)
        for table in tables:
            console.print(table)
        return
    from vsparse.training.loop import make_accelerator
    from vsparse.training.progress import Shown

    first = make_accelerator().is_main_process
    quiet()
    with Shown(console if first else Console(quiet=True), told.train.steps) as shown:
        result = work.finetune(told, told=shown)
    if first:
        console.print(f"the result is in {result}", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=USE)
@plainly
def plan(
    model: AnyModel,
    method: MethodKey = "adaspa",
    settings: Settings = [],  # noqa: B006
    dense_steps: DenseSteps = None,
    dense_layers: DenseLayers = None,
    search_at: SearchAt = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    batch: Batch = 1,
    gpus: Gpus = None,
    rates: Rates = None,
    links: Links = None,
    gpu_memory: GpuMemory = None,
) -> None:
    """Say what a method would do to a model, from its configuration alone: a 14B model is planned on a laptop.

    `vsparse plan WanTransformer3DModel --method vsa --height 480 --width 832 --frames 81 --steps 50`

    With a size also the time of a step, and with `--gpus 8` how 8 GPUs would best share each video, by prediction.
    """
    import vsparse
    from vsparse.measure import options, parallel_plan, tables
    from vsparse.measure.latency import ahead
    from vsparse.measure.latency import tables as latency_tables
    from vsparse.measure.skeleton import skeleton

    chosen = options.asked(method, settings)
    size, steps = options.sized(chosen, height, width, frames, steps)
    several = options.several(gpus, rates, links, gpu_memory, sized=None not in size.values())
    quiet()
    target = skeleton(model)
    schedule = options.schedule(chosen, dense_steps, dense_layers, search_at)
    made = vsparse.plan(target, chosen, **size, steps=steps, batch=batch, schedule=schedule)
    console.print(tables.plan_table(made, type(target).__name__))
    for name, why in made.skipped.items():
        console.print(f"[red]not patched[/red] {name}: {'; '.join(why)}", highlight=False)
    if made.grid is None:
        console.print("Give --height, --width and --frames for density, FLOPs, state and time.")
    else:
        with console.status("counting a step"):
            times, why = ahead.times_of(made, target, size, steps=steps, batch=batch)
        console.print(latency_tables.times_table(times, made.method.key))
        if why:
            console.print(f"The rest of a step is not counted: {why}.", style="yellow", highlight=False)
    if several is not None:
        with console.status("") as status:
            cluster = several.cluster(dense=made.kernel == "host")
            choice = parallel_plan.choose_parallel(
                made, cluster, several.gpus, batch=batch, gpu_memory=several.memory, told=status.update
            )
        console.print(choice.tables())
        console.print(f"--context-parallel {choice.setting}", highlight=False, soft_wrap=True)


# ---- look inside -------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=INSIDE)
@plainly
def methods(
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="One method, whole.", show_default=False)] = None,
) -> None:
    """List the methods, or tell everything of one: what it does, when to use it, options, published settings, cost.

    `vsparse methods` and then, say, `vsparse methods adaspa`
    """
    from vsparse.measure import tables
    from vsparse.methods import get_method, list_methods

    if key is None:
        console.print(tables.methods_table(list_methods()))
        return
    for part in tables.method_pages(key, get_method(key)):
        console.print(part, highlight=False)


@app.command(rich_help_panel=INSIDE)
@plainly
def doctor() -> None:
    """Say what is installed, and which implementation of each op runs here for which shape, or why none does."""
    from vsparse.measure import doctor as work
    from vsparse.measure import tables

    console.print(tables.packages_table(work.packages()))
    for line in work.devices():
        console.print(line, highlight=False)
    verdicts = work.verdicts()
    console.print("\nWhat runs each op, for head dimensions 64 and 128, blocks of 64 and 128, float32 and half:")
    console.print(tables.ops_table(verdicts))
    for reason, calls in work.reasons(verdicts).items():
        console.print(f"{calls}: {reason}", style="yellow", markup=False, highlight=False)
    for note, calls in work.notes(verdicts).items():
        console.print(f"{calls}: {note}", style="dim", markup=False, highlight=False)


@app.command(rich_help_panel=INSIDE)
@plainly
def draw(
    method: MethodKey = "vsa",
    settings: Settings = [],  # noqa: B006
    density: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Short for --set density=...", rich_help_panel=SPARSITY)
    ] = None,
    grid: Annotated[str, typer.Option(metavar="TxHxW", help="Latent frames, rows, columns.")] = "5x16x16",
    text_before: Annotated[int, typer.Option(metavar="N", min=0, help="Text tokens before the video.")] = 0,
    text_after: Annotated[int, typer.Option(metavar="N", min=0, help="Text tokens after the video.")] = 0,
    layout: Annotated[str, typer.Option(metavar="KIND", help="To draw: the method's, tile or raster.")] = "method",
    tile: Annotated[str | None, typer.Option(metavar="TxHxW", help="With --layout tile.")] = None,
    block: Annotated[int | None, typer.Option(metavar="N", min=1, help="With --layout tile or raster.")] = None,
    layer: Annotated[int, typer.Option(metavar="N", min=0, help="Layer of the demo model.")] = 2,
    random: Annotated[bool, typer.Option("--random", help="An untrained model also where the demo's fits.")] = False,
    seed: Seed = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A png; -layout and -map are added to its name.")
    ] = Path("draw.png"),
) -> None:
    """Draw which block each token belongs to, and which key blocks each query block keeps, head by head (two PNGs).

    `vsparse draw --method vsa --density 0.25 --grid 5x16x16 --text-after 20 -o out/draw.png`
    """
    from vsparse.geometry import Grid
    from vsparse.measure import drawing, options

    chosen = options.method(method, [*settings, *([] if density is None else [f"density={density}"])])
    t, h, w = options.sizes(grid, "--grid")
    lattice = Grid(t=t, h=h, w=w, text_before=text_before, text_after=text_after)
    edges = None if tile is None else options.sizes(tile, "--tile")
    quiet()
    with console.status("running the model"):
        written = drawing.draw_both(
            output, chosen, lattice, layout=layout, tile=edges, block=block, layer=layer, random=random, seed=seed
        )
    for line in written:
        console.print(line, highlight=False)


app.command(rich_help_panel=INSIDE)(latency_command.latency)
app.command(rich_help_panel=INSIDE)(profiles_command.profiles)
app.command(rich_help_panel=USE)(tune_command.tune)
app.command(rich_help_panel=INSIDE)(quality_command.quality)
