"""The four processes of the tests of context parallelism; a task that needs two makes pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import processes
import pytest


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[], processes.Pool]]:
    with processes.pool(4) as get:
        yield get
