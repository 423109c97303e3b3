"""Consistency distillation: nothing is left to learn for the exact answer, and the formulas written out elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch
from distilling import FLOW, as_good, denoised, forward, host, learnt
from oracle import check, ulp_floor
from torch import Tensor, nn

from vsparse.training.consistency import ConsistencyDistillation, few_steps
from vsparse.training.distill import VelocityDistillation
from vsparse.training.draws import Draws
from vsparse.training.objective import FlowMatching, Objective, objective_of
from vsparse.training.task import Denoised
from vsparse.training.teachers import StartWeights


def scheduler(name: str, **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**options)


DISCRETE = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
KINDS = {
    "flow": lambda: FlowMatching(shift=3.0),
    "v": lambda: objective_of(scheduler("CogVideoXDDIMScheduler", **DISCRETE)),
    "epsilon": lambda: objective_of(scheduler("CogVideoXDDIMScheduler", prediction_type="epsilon")),
}


# ---- an equation whose solution is known ---------------------------------------------------------------------------

# x' = x / 2 in noise levels that are multiples of 1/8, four to a segment; of samples that can be divided by 3 every
# number is exact in float64.
TOY = FlowMatching(num_train_timesteps=1024)
STEPS = 8
BORDERS = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
TIMES = torch.tensor([1 / 8, 2 / 8, 3 / 8, 4 / 8, 7 / 8, 8 / 8], dtype=torch.float64)
BEYOND = torch.tensor([1, 2, 3, 4, 3, 4])  # teacher's steps to the end of the segment
SHRINK = 1 - 0.5 / STEPS


class Toy(nn.Module):
    """``w`` is the share of the exact jump, the rest is the velocity of the equation; ``c`` moves it by the text."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, times: Tensor, shift: Tensor) -> Tensor:
        beyond = ((times * STEPS - 1) % 4 + 1)[:, None]
        jump = x * (1 - SHRINK**beyond) / (beyond / STEPS)
        return self.w * jump + (1 - self.w) * x / 2 + shift


def call(model: nn.Module, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> Tensor:
    return model(noisy, timestep.double() / 1024, text["shift"])  # type: ignore[no-any-return]


def toy(w: float, shift: float = 0.0, **options: Any) -> tuple[Toy, Denoised, ConsistencyDistillation]:
    """A student at ``w`` whose teacher is the equation itself."""
    model = Toy()
    start = StartWeights(model, copy="device")
    with torch.no_grad():
        model.w.fill_(w)
    noisy = 3 * torch.arange(1.0, 13.0, dtype=torch.float64).view(6, 2)
    text = {"shift": torch.full((6, 1), shift, dtype=torch.float64)}
    made = Denoised(
        model=model, forward=call, clean=noisy, noise=noisy, noisy=noisy, times=TIMES, timestep=TOY.timestep(TIMES),
        text=text, prediction=call(model, noisy, TOY.timestep(TIMES), text), draws=Draws(("toy",)),
    )  # fmt: skip
    return model, made, ConsistencyDistillation(TOY, start, BORDERS, steps=STEPS, **options)


def jump(x: Tensor, steps: Tensor, w: Tensor | float) -> Tensor:
    """Where a model at ``w`` puts x after so many steps at once."""
    return x * (w * SHRINK**steps + (1 - w) * (1 - 0.5 * steps / STEPS))


def by_hand(x: Tensor, w: Tensor | float, target: float) -> Tensor:
    """The differences at the ends of the segments."""
    steps = BEYOND[:, None].double()
    return jump(x, steps, w) - jump(x * SHRINK, steps - 1, target)


def test_the_exact_jump_has_no_loss() -> None:
    _, made, teacher = toy(1.0)
    assert float(teacher.loss(made).detach()) == 0.0


@pytest.mark.parametrize("target", [None, 0.5])
def test_another_jump_has_the_loss_and_gradient_of_the_formula(target: float | None) -> None:
    """The student's own weights as the target, or averaged ones; neither target nor teacher has a gradient."""
    averaged = None if target is None else {"w": torch.tensor(target, dtype=torch.float64)}
    model, made, teacher = toy(0.25, average=None if averaged is None else lambda: averaged)
    found = learnt(model, teacher.loss(made))
    w = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    wanted = by_hand(made.noisy, w, 0.25 if target is None else target).square().mean(1).mean()
    wanted.backward()
    assert torch.equal(found["loss"], wanted.detach())
    assert float(wanted.detach()) > 0
    check("gradient", found["w"].float(), w.grad.float(), w.grad)  # type: ignore[union-attr]


def test_huber_bends_each_sample() -> None:
    _, made, teacher = toy(0.25, huber=0.125)
    d = by_hand(made.noisy, 0.25, 0.25).square().mean(1)
    assert torch.equal(teacher.loss(made).detach(), ((d + 0.125**2).sqrt() - 0.125).mean())


def test_the_teacher_is_guided() -> None:
    """``x' = x / 2 + empty + w (text - empty)``; the student and the target see the text alone."""
    empty = {"shift": torch.full((1, 1), -1.0, dtype=torch.float64)}
    _, made, teacher = toy(0.0, shift=2.0, guidance=3.0, empty=empty)
    x, steps = made.noisy, BEYOND[:, None].double()
    led = x * SHRINK - (-1.0 + 3.0 * (2.0 + 1.0)) / STEPS
    far = x * (1 - 0.5 * steps / STEPS) - 2.0 * steps / STEPS
    near = led * (1 - 0.5 * (steps - 1) / STEPS) - 2.0 * (steps - 1) / STEPS
    assert torch.equal(teacher.loss(made).detach(), (far - near).square().mean(1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_knows_the_sample_has_nothing_to_learn(kind: str) -> None:
    """Its paths are the objective's own, so that every step and jump is exact: float32 could not write the rest."""
    objective: Objective = KINDS[kind]()
    clean, noise = (Draws((name,)).normal(torch.empty(5, 3)).double() for name in ("clean", "noise"))
    times = objective.sample(5, generator=torch.Generator().manual_seed(0))
    borders = objective.at(torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64))
    start = StartWeights(nn.Linear(1, 1).requires_grad_(False))
    teacher = ConsistencyDistillation(objective, start, borders, steps=20)
    asked = [times, teacher.times(times)[1]]

    def knows(_: nn.Module, noisy: Tensor, timestep: Tensor, text: object) -> Tensor:
        now = asked.pop(0)
        assert torch.equal(timestep, objective.timestep(now))
        assert float((noisy - objective.noise(clean, noise, now)[0]).abs().max()) <= ulp_floor(noisy.float())
        return objective.target(clean, noise, now)

    noisy, timestep = objective.noise(clean, noise, times)
    made = Denoised(
        model=nn.Linear(1, 1), forward=knows, clean=clean, noise=noise, noisy=noisy, times=times, timestep=timestep,
        text={}, prediction=objective.target(clean, noise, times), draws=Draws(("known",)),
    )  # fmt: skip
    assert float(teacher.loss(made)) <= ulp_floor(noisy.float()) ** 2
    assert not asked


# ---- times ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_share_is_the_inverse_of_at(kind: str) -> None:
    objective = KINDS[kind]()
    times = objective.sample(50, generator=torch.Generator().manual_seed(1))
    back = objective.at(objective.share(times))
    assert torch.allclose(back, times, rtol=torch.finfo(torch.float32).eps, atol=0)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert objective.share(objective.at(ends)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "hunyuan_video15", "cogvideox"])
def test_a_run_of_few_steps_goes_from_border_to_border(name: str) -> None:
    """Of a real pipeline: each of its calls lies at the beginning of a segment, whose end is the next call."""
    built = tiny_pipelines.PIPELINES[name]()
    scheduler = built[0].scheduler
    tiny_pipelines.run(built, num_inference_steps=3)
    objective = objective_of(scheduler)
    flow = isinstance(objective, FlowMatching)
    calls = scheduler.sigmas.double() if flow else torch.cat([scheduler.timesteps, torch.tensor([-1])])
    borders = few_steps(scheduler, 3)
    ends, _ = consistency(objective, borders).times(calls[:-1])
    assert torch.equal(ends, calls[1:])
    assert torch.equal(few_steps(tiny_pipelines.PIPELINES[name]()[0].scheduler, 3), borders), (
        "the pipeline's run must not matter"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_teachers_step_is_a_share_of_the_way_and_stays_in_the_segment(kind: str) -> None:
    objective = KINDS[kind]()
    share = torch.tensor([0.05, 0.1, 0.35, 0.72, 1.0], dtype=torch.float64)
    borders = objective.at(torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64))
    ends, nearer = consistency(objective, borders, steps=10).times(objective.at(share))
    same_times = objective.at(torch.tensor([0.0, 0.0, 0.3, 0.7, 0.9], dtype=torch.float64))
    assert torch.allclose(nearer, same_times, rtol=torch.finfo(torch.float32).eps, atol=torch.finfo(torch.float32).eps)
    assert torch.equal(ends, borders[[0, 0, 1, 2, 2]])


def consistency(objective: Objective, borders: Tensor, **options: Any) -> ConsistencyDistillation:
    return ConsistencyDistillation(objective, StartWeights(nn.Linear(1, 1).requires_grad_(False)), borders, **options)


@pytest.mark.parametrize(
    ("borders", "options", "words"),
    [
        ([-1, 400, 400], {}, "borders must be ascending torch.int64 times from -1 on, got"),
        ([0, 400], {}, "borders must be ascending torch.int64 times from -1 on, got"),
        ([-1], {}, "borders must be ascending torch.int64 times from -1 on, got"),
        ([-1.0, 400.0], {}, "borders must be ascending torch.int64 times from -1 on, got"),
        ([-1, 400], {"steps": 4000}, "steps must be at least 1 and no more than there are timesteps, got 4000"),
        ([-1, 400], {"steps": 0}, "steps must be at least 1 and no more than there are timesteps, got 0"),
        ([-1, 400], {"guidance": 2.0}, "guidance=2.0 needs empty"),
        ([-1, 400], {"huber": 0.0}, "huber must be positive or None, got 0.0"),
    ],
)
def test_wrong_options_are_refused(borders: list[Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        consistency(KINDS["v"](), torch.tensor(borders), **options)


# ---- on a host -----------------------------------------------------------------------------------------------------


def average_of(model: nn.Module) -> dict[str, Tensor]:
    """Other weights than the student's."""
    return {name: 0.9 * x.detach() for name, x in model.named_parameters()}


def student(dtype: torch.dtype) -> tuple[nn.Module, Any, dict[str, Any], StartWeights]:
    """Moved away from its start."""
    model, patch, values = host("wan", dtype=dtype)
    start = StartWeights(model, patch=patch, copy="cpu")
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.1)
    return model, patch, values, start


def plain(dtype: torch.dtype) -> dict[str, Tensor]:
    """Segments of a half, four steps, written out for straight paths: one stock teacher, one copied target."""
    stock, _ = rows.build("wan", dtype=dtype)
    model, patch, values, _ = student(dtype)
    made = denoised(model, values, VelocityDistillation(patch))
    target = copy.deepcopy(model)
    with torch.no_grad():
        for x in target.parameters():
            x.mul_(0.9)
    level = lambda u: 3 * u / (1 + 2 * u)  # noqa: E731
    u = made.times / (3 - 2 * made.times)
    end = torch.where(u > 0.5, level(torch.tensor(0.5)), 0.0)
    near = torch.maximum(level(u - 0.25), end)
    by = lambda x: x.to(dtype).view(-1, 1, 1, 1, 1)  # noqa: E731
    with torch.no_grad():
        led = made.noisy - by(made.times - near) * forward(stock, made.noisy, made.timestep, made.text)
        wanted = led - by(near - end) * forward(target, led, near * 1000, made.text)
    found = made.noisy - by(made.times - end) * made.prediction
    return learnt(model, (found - wanted).pow(2).mean())


def test_a_host_has_the_gradient_of_the_plain_formula() -> None:
    """A dense teacher with the first weights, a sparse target with averaged ones, the student between them."""
    model, patch, values, start = student(torch.float64)
    averaged = average_of(model)
    borders = FLOW.at(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    teacher = ConsistencyDistillation(FLOW, start, borders, steps=4, patch=patch, average=lambda: averaged)
    found = learnt(model, teacher.loss(denoised(model, values, teacher)))
    wide, narrow = plain(torch.float64), plain(torch.float32)
    as_good(found, wide, narrow)
    assert float(wide["loss"]) > 0
