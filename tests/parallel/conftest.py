"""The four processes of the tests of context parallelism, and a pair for what many tests do with two."""

from __future__ import annotations

from collections.abc import Iterator

import processes
import pytest
from processes import Get


@pytest.fixture(scope="session")
def pool() -> Iterator[Get]:
    with processes.pool(4) as get:
        yield get


@pytest.fixture(scope="session")
def pair() -> Iterator[Get]:
    with processes.pool(2) as get:
        yield get
