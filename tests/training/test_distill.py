"""Distillation: gradients are those of the plain formulas, the teacher gets none, recomputation changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny
import torch
from distilling import as_good, denoised, forward, host, learnt, one, same, task
from oracle import check, still_generator, ulp_floor
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vsparse
from vsparse.training import distill
from vsparse.training.distill import AttentionDistillation, VelocityDistillation
from vsparse.training.draws import Draws
from vsparse.training.loop import Trainer, TrainSettings
from vsparse.training.optimisers import OptimiserSettings
from vsparse.training.teachers import StartWeights, teaching

HOSTS = ("wan", "hunyuan_video", "cogvideox")


def distilled(kind: type, name: str, method: str = "attention_tile", **options: Any) -> dict[str, Tensor]:
    model, patch, values = host(name, method, **options)
    teacher = kind(patch)
    return learnt(model, teacher.loss(denoised(model, values, teacher)))


# ---- the prediction ------------------------------------------------------------------------------------------------


def plain_velocity(name: str, method: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Against a stock copy of the host."""
    stock, _ = rows.build(name, dtype=dtype)
    model, patch, values = host(name, method, dtype=dtype)
    made = denoised(model, values, VelocityDistillation(patch))
    with torch.no_grad():
        wanted = forward(stock, made.noisy, made.timestep, made.text)
    return learnt(model, (made.prediction - wanted).pow(2).mean())


@pytest.mark.parametrize(("name", "method"), [("wan", "vsa"), ("hunyuan_video", "attention_tile")])
def test_velocity_has_the_gradient_of_the_plain_formula(name: str, method: str) -> None:
    wide, narrow = (plain_velocity(name, method, dtype) for dtype in (torch.float64, torch.float32))
    as_good(distilled(VelocityDistillation, name, method, dtype=torch.float64), wide, narrow)
    assert float(wide["loss"]) > 0


def test_the_teacher_is_still_and_leaves_no_trace() -> None:
    """Without dropout, whatever the student has; flags, statistics and the generator stay as they were."""
    model, patch, values = host("wan")
    stock, _ = rows.build("wan")
    for block in (*model.blocks, *stock.blocks):
        block.attn1.to_out[1].p = 0.5
    model.blocks[1].eval()
    with tiny.seeded(0):
        made = denoised(model, values, VelocityDistillation(patch))
    flags, stats = [x.training for x in model.modules()], patch.stats()
    with still_generator():
        loss = VelocityDistillation(patch).loss(made)
    wanted = rows.forward(stock.eval(), {**values, "hidden_states": made.noisy, "timestep": made.timestep})
    assert torch.equal(loss, (made.prediction - wanted).square().mean())
    assert [x.training for x in model.modules()] == flags
    assert patch.stats() == stats


# ---- attention -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def seen(patch: vsparse.Patch) -> Iterator[list[tuple[Tensor, ...]]]:
    """q, k, v and output of every site, with their graph."""
    found: list[tuple[Tensor, ...]] = []
    handles = [x.register_forward_hook(lambda _, qkv, out: found.append((*qkv, out))) for x in patch.sites]
    yield found
    for handle in handles:
        handle.remove()


def missed(q: Tensor, k: Tensor, v: Tensor, out: Tensor, padding: list[int]) -> Tensor:
    """``|O - O'|^2 / |O'|^2`` of each sample, one after the other, padding cut off."""
    ratios = []
    for b, cut in enumerate(padding):
        n = q.shape[1] - cut
        one_q, one_k, one_v = (x[b, :n].detach() for x in (q, k, v))
        weights = (torch.einsum("qhd,khd->hqk", one_q, one_k) * q.shape[-1] ** -0.5).softmax(-1)
        wanted = torch.einsum("hqk,khd->qhd", weights, one_v)
        ratios.append((out[b, :n] - wanted).pow(2).sum() / wanted.pow(2).sum())
    return torch.stack(ratios).mean()


def padding_of(values: Mapping[str, Any]) -> list[int]:
    mask = values.get("encoder_attention_mask")
    return [0, 0] if mask is None else (mask.shape[1] - mask.sum(1)).tolist()


def plain_attention(name: str, method: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model, patch, values = host(name, method, dtype=dtype)
    with seen(patch) as found:
        denoised(model, values, VelocityDistillation(patch))
    assert len(found) == len(patch.sites)
    return learnt(model, torch.stack([missed(*x, padding_of(values)) for x in found]).mean())


@pytest.mark.parametrize(("name", "method"), [*((name, "attention_tile") for name in HOSTS), ("wan", "vsa")])
def test_attention_has_the_gradient_of_the_plain_formula(name: str, method: str) -> None:
    """Also in the parameters before a site: its inputs learn, too, while full attention on them is held fixed."""
    wide, narrow = (plain_attention(name, method, dtype) for dtype in (torch.float64, torch.float32))
    found = distilled(AttentionDistillation, name, method, dtype=torch.float64)
    as_good(found, wide, narrow)
    assert float(wide["loss"]) > 0
    assert any(".to_q." in x for x in found)


@pytest.mark.parametrize("name", HOSTS)
def test_checkpointing_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a bit, in float32 and under autocast; full attention is computed once for each site."""
    real, calls = distill._full_attention, []
    monkeypatch.setattr(distill, "_full_attention", lambda *args: calls.append(1) or real(*args))
    found = []
    for checkpointing in (False, True):
        model, patch, values = host(name)
        if checkpointing:
            model.enable_gradient_checkpointing()
        for amp in (False, True):
            teacher = AttentionDistillation(patch)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                made = denoised(model, values, teacher)
                loss = made.prediction.float().square().mean() + teacher.loss(made)
            found.append(learnt(model, loss))
            assert len(calls) == len(patch.sites)
            calls.clear()
    same(found[2], found[0])
    same(found[3], found[1])


def test_padding_and_the_batch_do_not_matter() -> None:
    """The loss of a batch is the mean of its samples'; the one with short text is not diluted by its padding."""
    model, patch, values = host("hunyuan_video", dtype=torch.float64)
    teacher = AttentionDistillation(patch)

    made = denoised(model, values, teacher)

    def loss(samples: slice) -> Tensor:
        with torch.no_grad(), teacher.watch():
            model(**{name: x[samples] if isinstance(x, Tensor) else x for name, x in values.items()})
        return teacher.loss(made)

    both, alone = loss(slice(0, 2)), [loss(slice(i, i + 1)) for i in range(2)]
    assert abs(float(both) - float(sum(alone)) / 2) <= ulp_floor(both.float())
    assert float(alone[0]) != float(alone[1])


def test_some_sites_alone() -> None:
    model, patch, values = host("wan", dtype=torch.float64)
    one = AttentionDistillation(patch, sites=patch.sites[:1])
    with seen(patch) as found:
        made = denoised(model, values, one)
    loss, wanted = one.loss(made).detach(), missed(*found[0], [0, 0]).detach()
    assert abs(float(loss - wanted)) <= ulp_floor(wanted.float())
    _, other, _ = host("wan")
    with pytest.raises(ValueError, match="sites must be sites of the patch, got"):
        AttentionDistillation(patch, sites=other.sites)


def test_dense_sites_have_no_part() -> None:
    model, inputs = rows.build("wan")
    patch = vsparse.apply(model, "dense")
    teacher = AttentionDistillation(patch)
    made = denoised(model, rows.prompt("wan", inputs, batch=2), teacher)
    assert float(teacher.loss(made)) == 0.0


def test_checkpoints_without_gradient_are_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    model, patch, values = host("wan")
    model.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=True))
    with pytest.raises(RuntimeError, match="checkpoint with use_reentrant=False"):
        denoised(model, values, AttentionDistillation(patch))
    assert not any(x._forward_hooks for x in patch.sites)


def test_a_graph_without_the_watch_is_refused() -> None:
    """Dynamo does not see a hook that comes after it has compiled."""
    model, patch, values = host("wan", layers=1)
    model.blocks[0].compile(backend="eager")
    denoised(model, values, VelocityDistillation(patch))
    with pytest.raises(RuntimeError, match=r"do not see the watch: blocks\.0\.attn1"):
        denoised(model, values, AttentionDistillation(patch))


# ---- density 1 -----------------------------------------------------------------------------------------------------


def whole(name: str, dtype: torch.dtype) -> tuple[nn.Module, vsparse.Patch, dict[str, Any]]:
    model, inputs = rows.build(name, dtype=dtype)
    everything: Any = rows.METHODS["attention_tile"].everything
    return model, vsparse.apply(model, "attention_tile", **everything), rows.prompt(name, inputs, batch=2)


def allowed(dense: Tensor, exact: Tensor) -> float:
    """How far the law lets the sparse and the dense tensor be from each other, at most."""
    return 3 * float((dense - exact).abs().max()) + ulp_floor(dense)


@pytest.mark.parametrize("name", HOSTS)
def test_at_density_one_the_prediction_is_the_teachers(name: str) -> None:
    found = {}
    for dtype in (torch.float64, torch.float32):
        model, patch, values = whole(name, dtype)
        teacher = VelocityDistillation(patch)
        with torch.no_grad():
            made = denoised(model, values, teacher)
        with teaching(model, patch, None) as dense:
            found[dtype] = made.prediction, forward(dense, made.noisy, made.timestep, made.text), teacher.loss(made)
    exact = found[torch.float64][1]
    mine, dense, loss = found[torch.float32]
    check("prediction", mine, dense, exact)
    assert float(loss) <= allowed(dense, exact) ** 2


@pytest.mark.parametrize("name", HOSTS)
def test_at_density_one_no_site_misses_anything(name: str) -> None:
    model, patch, values = whole(name, torch.float32)
    teacher, bounds = AttentionDistillation(patch), []
    with torch.no_grad(), seen(patch) as found:
        made = denoised(model, values, teacher)
    for (q, k, v, out), site in zip(found, patch.sites, strict=True):
        dense, exact = (
            distill._full_attention(*x, site.call) for x in ((q, k, v), (q.double(), k.double(), v.double()))
        )
        bounds.append(out.numel() * allowed(dense, exact) ** 2 / float(exact.square().sum((1, 2, 3)).min()))
    loss = teacher.loss(made)
    assert loss.dtype == torch.float32
    assert float(loss) <= sum(bounds) / len(bounds)


# ---- the weights that training began with --------------------------------------------------------------------------


def start_teacher(model: nn.Module, patch: vsparse.Patch, values: dict[str, Any], start: StartWeights) -> Tensor:
    with teaching(model, patch, start) as teacher:
        return teacher(**values)[0]  # type: ignore[no-any-return]


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(0.1 * Draws(("move", x.numel())).normal(x))


@pytest.mark.parametrize("train", ["lora", "method", "cpu", "device"])
def test_the_start_is_what_it_was(train: str) -> None:
    """Bit for bit; the student, its gradients and what learns are untouched by the teacher's call."""
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs, batch=2)
    before = rows.forward(model, values)
    if train in ("lora", "method"):
        model.requires_grad_(False)
    patch = rows.sparse(model, "vsa")
    for x in patch.parameters():
        x.requires_grad_(True)
    if train == "lora":
        from peft import LoraConfig

        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
        model.blocks[0].attn1.to_q.lora_A["default"].weight.requires_grad_(False)
    start = StartWeights(model, patch=patch, copy=train if train in ("cpu", "device") else None)  # type: ignore[arg-type]
    move(model.train())
    learning = {name: x.requires_grad for name, x in model.named_parameters()}

    def gradients(teach: bool) -> dict[str, Tensor]:
        teacher = VelocityDistillation(patch, start=start)
        made = denoised(model, values, teacher)
        if teach:
            assert torch.equal(start_teacher(model, patch, values, start), before)
        return learnt(model, made.prediction.square().mean())

    same(gradients(True), gradients(False))
    assert {name: x.requires_grad for name, x in model.named_parameters()} == learning
    assert not torch.equal(rows.forward(model, values), before)
    assert bool(start._kept) == (train in ("cpu", "device"))


def test_no_copy_is_made_unasked() -> None:
    model, patch, _ = host("wan")
    with pytest.raises(ValueError, match=r"parameters of the model learn; .* takes \d+\.\d\d GiB: give copy='device'"):
        StartWeights(model, patch=patch)
    with pytest.raises(ValueError, match="copy must be 'cpu', 'device' or None, got 'disk'"):
        StartWeights(model, copy="disk")  # type: ignore[arg-type]
    model.requires_grad_(False)
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_q: its adapter is not nothing"):
        StartWeights(model)


# ---- in the loop ---------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    """Noise is new in every step; still each of the last five misses less than any of the first five."""
    model, patch, values = host("wan")
    losses = []
    Trainer(
        model,
        task(values, data=0.0, teachers={"attention": (1.0, AttentionDistillation(patch))}),
        settings=TrainSettings(steps=20, precision="fp32"),
        optimiser=OptimiserSettings(learning_rate=1e-3, weight_decay=0.0),
        folder=tmp_path,
        identity={},
        progressed=lambda done, figures: losses.append(figures["attention"]),
    ).run()
    assert max(losses[-5:]) < min(losses[:5])


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_for_several_processes_it_is_the_same(alone: None) -> None:
    """DDP sees the student's forward alone; the teacher's goes past it, with weights by the model's own names."""
    found = []
    for wrap in (False, True):
        model, patch, values = host("wan", "vsa")
        velocity = VelocityDistillation(patch, start=StartWeights(model, patch=patch, copy="device"))
        move(model)
        teachers = {"velocity": (0.5, velocity), "attention": (0.5, AttentionDistillation(patch))}
        wrapped = DistributedDataParallel(model, static_graph=True) if wrap else model
        losses = task(values, teachers=teachers).loss(wrapped, *one(values), 0)
        assert losses.keys() == {"loss", "data", "velocity", "attention"}
        found.append(learnt(model, losses["loss"]))
    same(found[1], found[0])
