"""What the commands share: the console, and how errors are told."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as missing:
    raise ImportError(f'the vsparse command needs typer and rich: pip install "vsparse[cli]" ({missing})') from missing

__all__ = ["Console", "console", "errors", "flags", "plainly", "progress_bar", "quiet", "told_bar", "typer"]

P = ParamSpec("P")

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


@contextlib.contextmanager
def told_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar that says what runs, how much of it is over, and how much there is (0: not known yet)."""
    with progress_bar() as progress:
        task = progress.add_task("", total=None)

        def began(name: str, done: int, all_of_them: int) -> None:
            progress.update(task, description=name.ljust(18), completed=done, total=all_of_them or None)

        yield began
