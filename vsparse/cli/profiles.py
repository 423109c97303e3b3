"""``vsparse profiles``."""

from __future__ import annotations

from typing import Annotated

from vsparse.cli.common import console, plainly, quiet, typer

__all__ = ["profiles"]


@plainly
def profiles(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One, whole; or the file of your own.", show_default=False)
    ] = None,
) -> None:
    """List the profiles that come along, or tell everything of one: model, size, method, schedule, source, use.

    `vsparse profiles` and then, say, `vsparse profiles wan2.1-14b-720p-radial`
    """
    from vsparse.measure import profiles as work

    quiet()
    with console.status("planning"):
        shown = work.profiles_table(work.entries()) if name is None else work.page(work.entry(name))
    console.print(shown, highlight=False)
