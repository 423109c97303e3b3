"""Two processes, and four, that talk to each other; a test that asks for some gets those of the session."""

from __future__ import annotations

from collections.abc import Iterator

import processes
import pytest
from processes import Get


@pytest.fixture(scope="session")
def pool() -> Iterator[Get]:
    with processes.pool() as get:
        yield get


@pytest.fixture(scope="session")
def four() -> Iterator[Get]:
    with processes.pool(4) as get:
        yield get
