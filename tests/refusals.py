"""What a load that is refused must leave as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import rows
import torch

import vsparse


def refused(folder: Path, error: type[Exception], words: str) -> None:
    """Refused for an unpatched and for a patched model, both unchanged."""
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    mark, before = rows.footprint(model), rows.forward(model, values)
    with pytest.raises(error, match=f"(?s){words}"):
        vsparse.load(model, folder)
    assert rows.footprint(model) == mark
    assert torch.equal(rows.forward(model, values), before)
    with rows.randomise(vsparse.apply(model, "vsa", density=0.3, tile=(2, 4, 4), block=16), seed=8) as patch:
        sparse = rows.forward(model, values)
        mark = rows.footprint(model)
        with pytest.raises(error, match=f"(?s){words}"):
            vsparse.load(model, folder)
        assert rows.footprint(model) == mark
        assert torch.equal(rows.forward(model, values), sparse)
        assert vsparse.patch_of(model) is patch
