"""What the commands share: the console, how errors are told, and the options that several of them take."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Annotated, ParamSpec

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as missing:
    raise ImportError(f'the vsparse command needs typer and rich: pip install "vsparse[cli]" ({missing})') from missing

__all__ = [
    "INSIDE",
    "MACHINE",
    "SEE",
    "SPARSITY",
    "USE",
    "VIDEO",
    "Console",
    "DenseLayers",
    "DenseSteps",
    "Frames",
    "Height",
    "MethodKey",
    "Model",
    "SearchAt",
    "Seed",
    "Settings",
    "Steps",
    "Width",
    "console",
    "errors",
    "flags",
    "plainly",
    "progress_bar",
    "quiet",
    "typer",
]

P = ParamSpec("P")
SEE, USE, INSIDE = "See it work", "Use it on your model", "Look inside"

console = Console()
errors = Console(stderr=True)
flags = {"debug": False}


def plainly(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors that the library raises on purpose into one red sentence and exit code 2."""

    @functools.wraps(command)
    def _run(*args: P.args, **kwargs: P.kwargs) -> None:
        if flags["debug"]:
            return command(*args, **kwargs)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning)
                warnings.filterwarnings("ignore", module="huggingface_hub")
                warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # norms in float32
                return command(*args, **kwargs)
        except (ValueError, NotImplementedError, ImportError, OSError, RuntimeError) as error:
            errors.print(f"vsparse: {error}", style="bold red", markup=False, highlight=False)
        except KeyboardInterrupt:
            errors.print("vsparse: interrupted", style="bold red")
        raise typer.Exit(2)

    return _run


def quiet() -> None:
    """Leave the terminal to us: no progress bars or warnings of the libraries that load models."""
    from vsparse.optional import require

    for name in ("diffusers", "transformers"):
        logging = require(f"{name}.utils.logging", "diffusers")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


SPARSITY, VIDEO, MACHINE = "Sparsity", "Video (default: the pipeline's own)", "Where it runs"
MethodKey = Annotated[
    str, typer.Option("--method", "-m", metavar="KEY", help="See `vsparse methods`.", rich_help_panel=SPARSITY)
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set", "-s", metavar="NAME=VALUE", help="An option of the method; repeatable.", rich_help_panel=SPARSITY
    ),
]
DenseSteps = Annotated[
    float | None,
    typer.Option(metavar="SHARE", min=0, max=1, help="Dense steps, from the start.", rich_help_panel=SPARSITY),
]
DenseLayers = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Dense layers, from the first.", rich_help_panel=SPARSITY)
]
SearchAt = Annotated[
    str | None,
    typer.Option(metavar="SHARE,...", help="Steps at which maps are searched anew.", rich_help_panel=SPARSITY),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the noise.")]
Height = Annotated[int | None, typer.Option(metavar="N", min=1, help="Pixels.", rich_help_panel=VIDEO)]
Width = Annotated[int | None, typer.Option(metavar="N", min=1, help="Pixels.", rich_help_panel=VIDEO)]
Frames = Annotated[int | None, typer.Option(metavar="N", min=1, help="Frames.", rich_help_panel=VIDEO)]
Steps = Annotated[int | None, typer.Option(metavar="N", min=1, help="Denoising steps.", rich_help_panel=VIDEO)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or hub name of a diffusers pipeline.")]
