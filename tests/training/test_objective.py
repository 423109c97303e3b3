"""Objectives: what the scheduler undoes is what training asks for; times, targets and losses by their definitions."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_identity, assert_law, check, still_generator, ulp_floor
from torch import Tensor
from torch.distributions import Normal

from vsparse.training.objective import EpsilonPrediction, FlowMatching, Objective, VPrediction, objective_of

SIZE = (3, 2, 3, 4, 4)


def scheduler(name: str, **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**options)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler": lambda: scheduler("FlowMatchEulerDiscreteScheduler", shift=7.0),
    "unipc": lambda: scheduler("UniPCMultistepScheduler", **FLOW),
    "dpm": lambda: scheduler("DPMSolverMultistepScheduler", **FLOW),
    "cogvideox ddim": lambda: scheduler("CogVideoXDDIMScheduler", **V, timestep_spacing="trailing"),
    "cogvideox dpm": lambda: scheduler("CogVideoXDPMScheduler", **V, timestep_spacing="trailing"),
    "cogvideox epsilon": lambda: scheduler("CogVideoXDDIMScheduler", prediction_type="epsilon"),
}
KINDS = {
    "flow": lambda: objective_of(SCHEDULERS["unipc"]()),
    "v": lambda: objective_of(SCHEDULERS["cogvideox ddim"]()),
    "epsilon": lambda: objective_of(SCHEDULERS["cogvideox epsilon"]()),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = seeded(5)
    return [torch.randn(SIZE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def times_of(objective: Objective, seed: int = 0) -> Tensor:
    return objective.sample(SIZE[0], generator=seeded(seed))


# ---- the scheduler undoes what training asks for -----------------------------------------------------------------


def denoise(name: str, clean: Tensor, noise: Tensor, *, alone: bool = False) -> Tensor:
    """From noise to the end with a model that knows the one clean sample and answers with the training target.

    Args:
        alone: By the objective's own steps instead of the scheduler's.
    """
    stepper = SCHEDULERS[name]()
    objective = objective_of(stepper)
    stepper.set_timesteps(8)
    flow = isinstance(objective, FlowMatching)
    levels = stepper.sigmas.double() if flow else torch.cat([stepper.timesteps, torch.tensor([-1])])
    x, estimate, batch = noise, None, len(clean)
    for i, t in enumerate(stepper.timesteps):
        kept = 1 - levels[i] if flow else stepper.alphas_cumprod[t].double().sqrt()
        added = levels[i] if flow else (1 - stepper.alphas_cumprod[t].double()).sqrt()
        left = (x.double() - kept * clean.double()) / added
        times = levels[i].expand(batch)
        noisy, timestep = objective.noise(clean.double(), left, times)
        assert float((noisy - x).abs().max()) <= ulp_floor(x)
        assert torch.equal(timestep, t.expand(batch))
        answer = objective.target(clean.double(), left, times).to(x.dtype)
        if alone:
            x = objective.step_to(answer, x, times, levels[i + 1].expand(batch))
        elif name == "cogvideox dpm":
            before = stepper.timesteps[i - 1] if i else None
            x, estimate = stepper.step(answer, estimate, t, before, x, generator=seeded(9))
        else:
            x = stepper.step(answer, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_recovers_the_sample(name: str) -> None:
    """Its loop with the exact target ends at the clean sample, by the law; timesteps and noisy samples are its own."""
    clean, noise = samples(2, torch.float32)
    check(name, denoise(name, clean, noise), denoise(name, clean, noise, alone=True), clean.double())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_own_steps_recover_the_sample(name: str) -> None:
    """In float64 the objective's steps end closer to the sample than float32 could write it."""
    assert_identity(lambda *x: denoise(name, *x, alone=True), lambda clean, _: clean, samples(2), grads=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_sample_of_the_other_time(kind: str) -> None:
    """With the exact target every step lands on the path, and the clean sample is found from anywhere on it."""
    objective = KINDS[kind]()
    times, later = times_of(objective), times_of(objective, 1)

    def stepped(clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        noisy, _ = objective.noise(clean, noise, times)
        answer = objective.target(clean, noise, times)
        return objective.step_to(answer, noisy, times, later), objective.clean_from(answer, noisy, times)

    assert_identity(stepped, lambda clean, noise: (objective.noise(clean, noise, later)[0], clean), samples(2))


def test_flow_step_is_eulers() -> None:
    objective = KINDS["flow"]()
    times, later = times_of(objective), times_of(objective, 1)
    dt = (later - times).view(-1, 1, 1, 1, 1)
    euler = lambda answer, noisy: noisy + dt.to(noisy) * answer  # noqa: E731
    assert_identity(lambda answer, noisy: objective.step_to(answer, noisy, times, later), euler, samples(2))


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v", "epsilon"])
def test_noise_and_target_are_the_schedulers(kind: str) -> None:
    stepper = SCHEDULERS["cogvideox ddim" if kind == "v" else "cogvideox epsilon"]()
    objective = objective_of(stepper)
    times = torch.tensor([0, 321, 999])

    def theirs(clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        aim = stepper.get_velocity(clean, noise, times) if kind == "v" else 1 * noise
        return stepper.add_noise(clean, noise, times), aim

    def mine(clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return objective.noise(clean, noise, times)[0], objective.target(clean, noise, times)

    assert_law(mine, theirs, samples(2, torch.float32))


def test_flow_noise_and_target_are_the_definition() -> None:
    objective = KINDS["flow"]()
    times = times_of(objective)
    s = times.view(-1, 1, 1, 1, 1)
    assert_law(
        lambda clean, noise: (objective.noise(clean, noise, times)[0], objective.target(clean, noise, times)),
        lambda clean, noise: ((1 - s).to(clean) * clean + s.to(clean) * noise, noise - clean),
        samples(2, torch.float32),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_never_computed_in(kind: str) -> None:
    """bfloat16 samples are read, float32 samples and losses are written, as exact as float32 inputs would make them."""
    objective = KINDS[kind]()
    times = times_of(objective)
    prediction, clean, noise = samples(3, torch.bfloat16)

    def everything(prediction: Tensor, clean: Tensor, noise: Tensor) -> list[Tensor]:
        noisy, _ = objective.noise(clean, noise, times)
        return [
            noisy,
            objective.target(clean, noise, times),
            objective.clean_from(prediction, noisy, times),
            objective.step_to(prediction, noisy, times, times_of(objective, 1)),
            objective.loss(prediction, clean, noise, times),
        ]

    wide = [x.float() for x in (prediction, clean, noise)]
    for mine, float32 in zip(everything(prediction, clean, noise), everything(*wide), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, float32)


def test_timesteps_are_what_the_solvers_call_with() -> None:
    """UniPC and DPM round down, Euler does not: their noise levels come with their timesteps."""
    for name in ("unipc", "dpm", "euler"):
        stepper = SCHEDULERS[name]()
        objective = objective_of(stepper)
        stepper.set_timesteps(50)
        assert torch.equal(objective.timestep(stepper.sigmas[:-1]), stepper.timesteps), name
    assert KINDS["flow"]().timestep(torch.tensor([0.0, 0.9999, 1.0])).tolist() == [0, 999, 999]


# ---- losses --------------------------------------------------------------------------------------------------------


def test_cogvideox_loss_is_the_velocitys() -> None:
    """The squared error of x0 over 1 - r, as CogVideoX was trained, is the squared error of the velocity."""
    objective = KINDS["v"]()
    times = torch.tensor([3, 500, 999])
    r = objective.alphas_cumprod[times].view(-1, 1, 1, 1, 1)

    def published(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
        a, b = r.sqrt().to(clean), (1 - r).sqrt().to(clean)
        estimate = a * (a * clean + b * noise) - b * prediction
        return ((estimate - clean).square() / (1 - r).to(clean)).flatten(1).mean(1)

    assert_identity(lambda *x: objective.loss(*x, times), published, samples(3))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_mean_squared_error_of_each_sample(kind: str) -> None:
    objective = KINDS[kind]()
    times = times_of(objective)
    plain = lambda y, x0, e: (y - objective.target(x0, e, times)).square().mean((1, 2, 3, 4))  # noqa: E731
    assert_law(lambda *x: objective.loss(*x, times), plain, samples(3, torch.float32))
    _, clean, noise = samples(3)
    assert not objective.loss(objective.target(clean, noise, times), clean, noise, times).any()


def test_a_weight_is_used() -> None:
    class Doubled(FlowMatching):
        def weight(self, times: Tensor) -> Tensor:
            return torch.full_like(times, 2.0)

    times = times_of(FlowMatching())
    inputs = samples(3)
    assert torch.equal(Doubled().loss(*inputs, times), 2 * FlowMatching().loss(*inputs, times))
    assert FlowMatching().weight(times).tolist() == [1.0] * len(times)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_not_broadcast(kind: str) -> None:
    objective = KINDS[kind]()
    times = times_of(objective)
    prediction, clean, noise = samples(3)
    with pytest.raises(ValueError, match="prediction must have the shape of clean"):
        objective.loss(prediction[:, :1], clean, noise, times)
    with pytest.raises(ValueError, match="samples must be"):
        objective.noise(clean, noise[:1], times)
    with pytest.raises(ValueError, match="samples must be"):
        objective.noise(clean, noise, times[:1])


# ---- times ---------------------------------------------------------------------------------------------------------


def share_below(objective: FlowMatching, s: Tensor, span: tuple[float, float]) -> Tensor:
    """Distribution function of the noise level, written from its definition."""

    def whole(s: Tensor) -> Tensor:
        u = s / (objective.shift - (objective.shift - 1) * s)
        return u if objective.logit_normal is None else Normal(*objective.logit_normal).cdf(u.logit())

    low, high = whole(torch.tensor(span, dtype=torch.float64))
    return (whole(s) - low) / (high - low)


SPANS = ((0.0, 1.0), (0.9, 1.0), (0.0, 0.875))
DRAWS = {
    "uniform": FlowMatching(),
    "shifted": FlowMatching(shift=5.0),
    "logit-normal": FlowMatching(logit_normal=(0.0, 1.0)),
    "both": FlowMatching(shift=3.0, logit_normal=(-0.5, 1.3)),
}


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("draw", DRAWS)
def test_noise_levels_have_their_distribution(draw: str, span: tuple[float, float]) -> None:
    """4000 levels: the largest gap between their distribution and the definition's is one that chance gives.

    The bound is that of Dvoretzky, Kiefer, Wolfowitz and Massart, which fails once in a billion draws.
    """
    count, objective = 4000, DRAWS[draw]
    with still_generator():
        times = objective.sample(count, generator=seeded(), span=span)
    assert times.dtype == torch.float64
    assert span[0] <= float(times.min()) <= float(times.max()) <= span[1]
    shares = share_below(objective, times, span).sort().values
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    gap = max(float((steps[1:] - shares).max()), float((shares - steps[:-1]).max()))
    assert gap <= math.sqrt(math.log(2e9) / (2 * count))
    assert torch.equal(times, objective.sample(count, generator=seeded(), span=span))
    assert not torch.equal(times, objective.sample(count, generator=seeded(1), span=span))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("draw", DRAWS)
def test_stratified_levels_fill_every_stratum(draw: str, span: tuple[float, float]) -> None:
    """One level in each of B equally likely intervals, in an order that is not theirs."""
    objective = dc.replace(DRAWS[draw], stratified=True)
    times = objective.sample(16, generator=seeded(), span=span)
    strata = (16 * share_below(objective, times, span)).long()
    assert sorted(strata.tolist()) == list(range(16))
    assert strata.tolist() != sorted(strata.tolist())


@pytest.mark.parametrize("stratified", [False, True])
def test_discrete_times_take_every_timestep(stratified: bool) -> None:
    """A thousand strata of a thousand timesteps are all of them; independent draws stay in the span."""
    objective = dc.replace(KINDS["v"](), stratified=stratified)
    with still_generator():
        times = objective.sample(1000, generator=seeded())
        some = objective.sample(1000, generator=seeded(), span=(0.25, 0.26))
    assert times.dtype == torch.int64
    assert (set(times.tolist()) == set(range(1000))) == stratified
    assert set(some.tolist()) == set(range(250, 260))
    assert torch.equal(objective.timestep(times), times)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_refuses(kind: str) -> None:
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        KINDS[kind]().sample(0, generator=seeded())
    for span in ((0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.5)):
        with pytest.raises(ValueError, match="span must be 0 <= low < high <= 1"):
            KINDS[kind]().sample(4, generator=seeded(), span=span)
    if kind != "flow":
        with pytest.raises(ValueError, match=r"span \(0.0001, 0.0002\) holds none of 1000 timesteps"):
            KINDS[kind]().sample(4, generator=seeded(), span=(0.0001, 0.0002))


# ---- schedulers ----------------------------------------------------------------------------------------------------


def test_what_a_scheduler_says() -> None:
    flow = objective_of(SCHEDULERS["euler"]())
    assert isinstance(flow, FlowMatching)
    assert (flow.shift, flow.num_train_timesteps, flow.integer) == (7.0, 1000, False)
    for name in ("unipc", "dpm"):
        flow = objective_of(SCHEDULERS[name]())
        assert isinstance(flow, FlowMatching)
        assert (flow.shift, flow.integer) == (3.0, True)
    assert isinstance(objective_of(SCHEDULERS["cogvideox dpm"]()), VPrediction)
    assert isinstance(objective_of(SCHEDULERS["cogvideox epsilon"]()), EpsilonPrediction)
    assert objective_of(SCHEDULERS["unipc"](), shift=8.0).shift == 8.0
    moved = SCHEDULERS["euler"]()
    moved.set_shift(2.5)
    assert objective_of(moved).shift == 2.5


def test_a_shift_by_resolution_must_be_given() -> None:
    """With ``shift=exp(mu)`` the noise levels are those that the scheduler computes from ``mu``."""
    stepper = scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=r"use_dynamic_shifting\): give shift=exp\(mu\)"):
        objective_of(stepper)
    mu = 1.1
    objective = dc.replace(objective_of(stepper, shift=math.exp(mu)), stratified=True)
    levels = objective.sample(64, generator=seeded())
    plain = dc.replace(objective, shift=1.0).sample(64, generator=seeded())
    assert_identity(lambda _: levels, lambda u: stepper.time_shift(mu, 1.0, u), [plain], grads=False)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas=True"),
        ("UniPCMultistepScheduler", {}, "prediction_type='epsilon', use_flow_sigmas=False"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "use_flow_sigmas=False"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
        ("CogVideoXDDIMScheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("DDPMScheduler", {}, "known are FlowMatchEuler"),
        ("CogVideoXDDIMScheduler", {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "ends at 0"),
    ],
)
def test_schedulers_that_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        objective_of(scheduler(name, **options))


def test_options_that_are_refused() -> None:
    with pytest.raises(ValueError, match="the timesteps of CogVideoXDDIMScheduler are not shifted"):
        objective_of(SCHEDULERS["cogvideox ddim"](), shift=3.0)
    for options in ({"shift": 0.0}, {"shift": -1.0}, {"shift": math.inf}, {"num_train_timesteps": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            FlowMatching(**options)
    with pytest.raises(ValueError, match="positive standard deviation"):
        FlowMatching(logit_normal=(0.0, 0.0))
    for table in ([], [0.5, 0.7], [1.0, 0.5], [0.5, -0.1], [[0.5]]):
        with pytest.raises(ValueError, match="alphas_cumprod must fall"):
            VPrediction(alphas_cumprod=torch.tensor(table))


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_found_again_from_their_share_of_the_steps(kind: str) -> None:
    """Shares rise with the times, from 0 for the clean sample to 1 for noise."""
    objective = KINDS[kind]()
    times = objective.sample(64, generator=seeded(2)).sort().values
    share = objective.share(times)
    assert bool((share.diff() >= 0).all())
    assert objective.share(objective.at(torch.tensor([0.0, 1.0], dtype=torch.float64))).tolist() == [0.0, 1.0]
    if times.is_floating_point():
        assert torch.equal(objective.at(share).float(), times.float())
    else:
        assert torch.equal(objective.at(share), times)
