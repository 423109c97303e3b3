"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["append_line", "clear_partial", "explained", "publish", "sync", "whole_file", "whole_folder"]

PARTIAL = ".partial-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_partial(folder: Path) -> None:
    """Remove what a killed run has left half written."""
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def publish(scratch: Path, target: Path) -> None:
    """Give a folder that is complete its name; its files are on the disk before."""
    for path in scratch.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors lets only the owner read
            sync(path)
    sync(scratch)
    scratch.rename(target)
    sync(target.parent)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A scratch folder beside ``target`` that gets its name when the block ends well, and goes when it does not.

    Raises:
        FileExistsError: the target exists. OSError: the disk is full, said in words.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}-{target.name}")
    with explained(target):
        scratch.mkdir()
        try:
            yield scratch
            publish(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A scratch name beside ``target``; the file takes its place when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}-{target.name}")
    with explained(target):
        try:
            yield scratch
            sync(scratch)
            os.replace(scratch, target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """Add one line to a log."""
    with explained(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Say in words that a disk is full."""
    try:
        yield
    except Exception as error:
        # safetensors raises its own type, with the number of the system in its words.
        full = getattr(error, "errno", None) in _FULL or any(f"os error {number}" in str(error) for number in _FULL)
        if not full:
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: {target} was not written; what was there before is untouched. Make room and start the "
            "same command again",
        ) from error
