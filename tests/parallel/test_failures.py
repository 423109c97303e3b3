"""What cannot be divided is refused on every process, and a process that fails does not leave the others waiting."""

from __future__ import annotations

import copy
import datetime
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rows
import torch
import torch.distributed as dist
from divided import enable_parallelism
from processes import Get
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import vsparse
from vsparse.parallel.context import ContextParallel, open_groups, parse

FOUR = "ulysses=2,ring=2"
FAILED = (ValueError, NotImplementedError, RuntimeError)


def _wan(method: str = "vsa", setting: str = FOUR, heads: int = 3, **more: Any) -> tuple[nn.Module, vsparse.Patch]:
    model, _ = rows.build("wan", heads=heads)
    options = {**rows.METHODS[method].sparse, **more}
    return model, vsparse.apply(model, method, parallel=parse(setting), **options)


def _forward(model: nn.Module, grid: tuple[int, int, int] = rows.SMALL, batch: int = 1) -> None:
    _, inputs = rows.build("wan")
    rows.forward(model, rows.prompt("wan", inputs, grid, batch=batch))


# ---- refused on every process ------------------------------------------------------------------------------------


def _another_option() -> None:
    _wan(density=0.3 if dist.get_rank() else 0.5)


def _another_setting() -> None:
    _wan(setting=FOUR if dist.get_rank() else "ulysses=4", heads=5)


def _another_balance() -> None:
    model, _ = rows.build("wan", heads=3)
    setting = ContextParallel(ulysses=2, ring=2, balance=None if dist.get_rank() else 1.1)
    vsparse.apply(model, "vsa", parallel=setting, **rows.METHODS["vsa"].sparse)


def _another_grid() -> None:
    _forward(_wan()[0], (4, 3, 7) if dist.get_rank() else (4, 5, 7))


def _another_grid_later() -> None:
    """Known to some processes, new to others."""
    model, _ = _wan()
    _forward(model)
    _forward(model, (4, 3, 7) if dist.get_rank() else (4, 5, 7))


def _another_batch() -> None:
    _forward(_wan()[0], batch=1 if dist.get_rank() else 2)


def _does_not_fit() -> None:
    _wan(setting="ulysses=3")


def _more_than_heads() -> None:
    _wan(setting="ulysses=4")


def _few_tiles() -> None:
    _forward(_wan(setting="ring=4")[0], (2, 3, 4))


def _few_tokens() -> None:
    _forward(_wan(setting="ulysses=4", heads=5)[0], (1, 1, 3))


def _a_part_without_tokens() -> None:
    """Tiles of four tokens and of one: the second shard has one token for two processes."""
    _forward(_wan(tile=(1, 1, 4))[0], (1, 1, 5))


def _not_all_can_be_patched() -> None:
    model, _ = rows.build("hunyuan_video")
    model.register_to_config(image_condition_type="token_replace")
    vsparse.apply(model, "adaspa", strict=False, parallel=parse("ulysses=2"), **rows.METHODS["adaspa"].sparse)


def _vmoba() -> None:
    _forward(_wan("vmoba", setting="ring=4", schedule=vsparse.Schedule())[0])


def _svg2() -> None:
    _forward(_wan("svg2", setting="gather=4", schedule=vsparse.Schedule())[0])


def _by_layer() -> None:
    _forward(_wan("by_layer")[0])


def _copied() -> None:
    copy.deepcopy(_wan()[0])


def _averaged() -> None:
    model, _ = rows.build("wan", heads=3)
    setting = ContextParallel(ulysses=2, ring=2, gradients="mean")
    vsparse.apply(model, "vsa", parallel=setting, **rows.METHODS["vsa"].sparse).sum_gradients()


def _divided_twice() -> None:
    model, _ = _wan(setting="ulysses=2", heads=2)
    enable_parallelism(model, parse("ulysses=2"))
    _forward(model, (4, 4, 6))


def _more_than_heads_of_diffusers() -> None:
    model, _ = rows.build("wan", heads=2)
    vsparse.apply(model, "vsa", **rows.METHODS["vsa"].sparse)
    enable_parallelism(model, parse(FOUR))
    _forward(model, (4, 4, 6))


def _other_mesh() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "ulysses"))
    open_groups(ContextParallel(ring=2, mesh=mesh), torch.device("cpu"))


def _replaced_tokens() -> None:
    model, _ = rows.build("hunyuan_video")
    model.register_to_config(image_condition_type="token_replace")
    vsparse.apply(model, "adaspa", parallel=parse("ulysses=2"), **rows.METHODS["adaspa"].sparse)


REFUSALS = [
    (_another_option, ValueError, ["method differs", "process 0: ", "'density': 0.5", "process 3: ", "'density': 0.3"]),
    (_another_setting, ValueError, ["setting differs", "process 0: 'ulysses=4'", f"process 1: '{FOUR}'"]),
    (_another_balance, ValueError, ["balance differs", "process 0: 1.1", "process 1: None"]),
    (_another_grid, ValueError, ["grid differs", "process 0: Grid(t=4, h=5", "process 1: Grid(t=4, h=3"]),
    (_another_grid_later, ValueError, ["grid differs", "process 0: ", "h=5", "h=3"]),
    (_another_batch, ValueError, ["batch differs", "process 0: 2", "process 1: 1"]),
    (_does_not_fit, ValueError, ["ulysses=3 takes groups of 3", "there are 4", "ulysses=2, ulysses=4"]),
    (_more_than_heads, ValueError, ["3 heads", "ulysses=4", "ulysses=3 with ring or gather"]),
    (_few_tiles, ValueError, ["1 tiles", "4 processes", "ulysses", "larger video"]),
    (_few_tokens, ValueError, ["3 video tokens", "4 processes", "fewer"]),
    (_a_part_without_tokens, ValueError, ["without a token", "(4, 1) video tokens"]),
    (_vmoba, NotImplementedError, ["ring=4 shares tokens", "several orders", "ulysses=4"]),
    (_svg2, NotImplementedError, ["gather=4 shares tokens", "order of the tokens in each call", "ulysses=4"]),
    (_by_layer, NotImplementedError, [f"{FOUR} shares tokens", "several orders", "ulysses=4"]),
    (_copied, NotImplementedError, ["cannot be copied", "remove the patch"]),
    (_averaged, ValueError, ['gradients="mean"', "DDP or fully_shard", 'gradients="sum"']),
    (_divided_twice, ValueError, ["enable_parallelism", "parallel=ulysses=2", "one of them"]),
    (
        _more_than_heads_of_diffusers,
        ValueError,
        [f"{FOUR} of diffusers", "4 processes for 2 heads", "ContextParallel("],
    ),
    (_other_mesh, ValueError, ["ring=2 needs a mesh", "'ring' of 2", "'ulysses': 2"]),
    (_replaced_tokens, NotImplementedError, ["HunyuanVideoTransformer3DModel", "image_condition_type='token_replace'"]),
]


def _refusal(task: Callable[[], None]) -> tuple[str, str] | None:
    """Of one process; afterwards all of them can still talk."""
    try:
        task()
    except FAILED as error:
        dist.barrier()
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize(("task", "kind", "parts"), REFUSALS, ids=lambda x: getattr(x, "__name__", ""))
def test_refused_on_every_process(pool: Get, task: Callable[[], None], kind: type, parts: list[str]) -> None:
    found = pool().run(_refusal, task)
    assert all(one is not None for one in found), found
    assert {name for name, _ in found} == {kind.__name__}, found
    for _, message in found:
        missing = [part for part in parts if part not in message]
        assert not missing, f"{missing} not in: {message}"


def _told() -> list[str]:
    """The last process ends its loop before the second forward, as one does whose data cannot be read; then all go on,
    in a loop and without one. What each of them heard.
    """
    model, patch = _wan()
    found = ""
    try:
        with patch.telling():
            _forward(model)
            if dist.get_rank() == 3:
                raise OSError("the clip cannot be read")
            _forward(model)
    except (OSError, RuntimeError) as error:
        found = str(error)
    dist.barrier()
    with patch.telling():
        _forward(model)
    _forward(model)
    return [found, str(patch.stats()["calls"])]


def test_what_ends_a_loop_is_told_to_those_who_wait(pool: Get) -> None:
    *waiting, (own, calls) = pool().run(_told)
    assert own == "the clip cannot be read"
    for heard, theirs in waiting:
        assert "a forward of the context group did not come" in heard, heard
        assert "another process has failed: process 3 of 4: OSError: the clip cannot be read" in heard, heard
        assert theirs == calls


# ---- refused without any process group ---------------------------------------------------------------------------


def test_without_process_group() -> None:
    model, _ = rows.build("wan")
    with pytest.raises(
        RuntimeError, match=r"ulysses=2 needs 2 processes, and torch\.distributed is not initialised.*tor"
    ):
        vsparse.apply(model, "dense", parallel=ContextParallel(ulysses=2))
    assert vsparse.patch_of(model) is None


def test_nccl_does_not_send_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"is_initialized": True, "get_world_size": 2, "get_backend": "nccl", "get_backend_config": "cuda:nccl"}
    for name, value in said.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    with pytest.raises(ValueError, match="the model is on the CPU, which nccl cannot send from; use gloo"):
        open_groups(ContextParallel(ulysses=2), torch.device("cpu"))


@pytest.mark.parametrize(
    "text", ["", "ulysses", "ulysses=", "ulysses=two", "ulysses=²", "heads=2", "ring=2,ring=2", "2"]
)
def test_texts_that_are_no_setting(text: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^context parallel: {re.escape(repr(text))} is not .* write ulysses=2, ring=2"
    ):
        parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ulysses": 0}, "ulysses must be an integer >= 1, got 0"),
        ({"ring": True}, "ring must be an integer >= 1, got True"),
        ({"gather": 2.0}, "gather must be an integer >= 1, got 2.0"),
        ({"ring": 2, "gather": 3}, "ring=2 and gather=3 are two ways"),
        ({"balance": 0.5}, "balance must be at least 1, or None, got 0.5"),
        ({"gradients": "none"}, '"sum" or "mean", got \'none\''),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ContextParallel(**options)


@pytest.mark.parametrize("text", ["ulysses=2", " ulysses = 2 , ring=3 ", "gather=2", "ulysses=1"])
def test_texts_of_settings_come_back(text: str) -> None:
    assert str(parse(text)) == text.replace(" ", "")
    assert parse(str(parse(text))) == parse(text)


# ---- processes that end -------------------------------------------------------------------------------------------

LIMIT = 6.0  # seconds after which a process no longer waits for another one


def _raises(*_: object) -> None:
    raise RuntimeError("out of luck")


def _dies(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _doomed(
    rank: int, setting: str, end: Callable[..., None], block: int | None, store: str, meet: Any, pipe: Any
) -> None:
    """Process 1 ends before its second forward, or in a block of it; process 0 says how long it waited, and why not."""
    torch.set_num_threads(1)
    model, _ = rows.build("wan", heads=3)
    meet.wait()
    limit = datetime.timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    vsparse.apply(model, "vsa", parallel=parse(setting), **rows.METHODS["vsa"].sparse)
    _forward(model)
    if rank == 1 and block is None:
        end()
    if rank == 1:
        model.blocks[block].register_forward_pre_hook(end)
    began = time.monotonic()
    try:
        _forward(model)
    except FAILED as error:
        pipe.send((type(error).__name__, str(error), time.monotonic() - began))
    else:
        pipe.send(("nothing", "", 0.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "end", "block", "parts"),
    [
        ("ulysses=2", _raises, 1, ["another process has failed: process 1 of 2: RuntimeError: out of luck"]),
        pytest.param(
            "ring=2",
            _raises,
            1,
            ["another process has failed: process 1 of 2: RuntimeError: out of luck"],
            marks=pytest.mark.full,
        ),
        ("ring=2", _dies, 1, ["a process is gone"]),
        ("ulysses=2", _dies, None, ["a process is gone", "context"]),
    ],
)
def test_a_process_that_ends(tmp_path: Path, setting: str, end: Any, block: int | None, parts: list[str]) -> None:
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])
    meet = context.Barrier(2)
    pipes = [context.Pipe() for _ in range(2)]
    both = [
        context.Process(
            target=_doomed, args=(rank, setting, end, block, str(tmp_path / "store"), meet, pipes[rank][1]), daemon=True
        )
        for rank in range(2)
    ]
    for process in both:
        process.start()
    try:
        assert pipes[0][0].poll(60 + LIMIT), "process 0 still waits"
        kind, message, waited = pipes[0][0].recv()
    finally:
        for process in both:
            process.kill()
            process.join()
    assert kind == "RuntimeError", message
    assert all(part in message for part in parts), message
    assert waited < 2 * LIMIT
    if end is _raises:
        kind, message, _ = pipes[1][0].recv()
        assert (kind, message) == ("RuntimeError", "out of luck")
