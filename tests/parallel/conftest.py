"""The four processes of the tests of context parallelism; a task that needs two makes pairs of them."""

from __future__ import annotations

from collections.abc import Iterator

import processes
import pytest
from processes import Get


@pytest.fixture(scope="session")
def pool() -> Iterator[Get]:
    with processes.pool(4) as get:
        yield get
