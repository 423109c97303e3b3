"""What a model is trained to predict and how its samples are noised, read off the scheduler that samples from it.

Every objective here mixes a clean sample ``x0`` and noise ``e`` by numbers that depend on the time alone::

    x = a x0 + b e      what the model sees
    y = c x0 + d e      what it shall predict

so ``x0``, ``e`` and the sample of any other time follow from ``x`` and ``y`` by solving two equations. The four numbers
are computed in float64; samples are mixed in float32, or in float64 where they are, whatever dtype the model has.
"""

from __future__ import annotations

import dataclasses as dc
import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

__all__ = ["EpsilonPrediction", "FlowMatching", "Objective", "VPrediction", "objective_of"]

_EULER = ("FlowMatchEulerDiscreteScheduler",)
_SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
_DISCRETE = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """What the objectives have in common. Samples are ``[B, ...]``, times ``[B]``.

    Args:
        stratified: Draw one time from each of B equally likely intervals, in random order, instead of B independent
            ones; the loss of a small batch varies less. Where a batch is spread over processes, draw the times of all
            on each of them, with the same generator, and take your share.

    Source of ``stratified``: CogVideoX (arXiv:2408.06072), "explicit uniform sampling".
    """

    stratified: bool = False

    def sample(self, batch: int, *, generator: torch.Generator, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Times to train at.

        Args:
            batch: B. generator: Draws them, on its device. span: Shares of the noise to stay in, as
                `TrainingHost.experts` gives them.

        Returns:
            ``[B]``: float64 noise levels for flow matching, int64 timesteps otherwise.

        Raises:
            ValueError: an empty batch, a span that is not ``0 <= low < high <= 1``.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not 0 <= span[0] < span[1] <= 1:
            raise ValueError(f"span must be 0 <= low < high <= 1, got {span}")
        level = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
        if self.stratified:
            level = (torch.randperm(batch, generator=generator, device=generator.device) + level) / batch
        return self._quantile(level, span)

    def timestep(self, times: Tensor) -> Tensor:
        """``[B]`` in the scheduler's scale: what the model is given."""
        raise NotImplementedError

    def share(self, times: Tensor) -> Tensor:
        """``[B]`` float64: how far along the scheduler's steps times lie, 0 the clean sample, 1 pure noise."""
        raise NotImplementedError

    def at(self, share: Tensor) -> Tensor:
        """Times at shares of the scheduler's steps; the inverse of `share`."""
        raise NotImplementedError

    def noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """A noisy sample, and the timestep that the model is given with it."""
        a, b, _, _ = self._numbers(times)
        return _mix((a, b), clean, noise), self.timestep(times)

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the model shall predict."""
        _, _, c, d = self._numbers(times)
        return _mix((c, d), clean, noise)

    def weight(self, times: Tensor) -> Tensor:
        """``[B]`` factors of the squared errors: 1, as the models were trained."""
        return torch.ones(times.shape, dtype=torch.float32, device=times.device)

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """``[B]`` weighted mean squared error of each sample, in float32 (float64 if a sample is).

        Raises:
            ValueError: shapes that differ; they are not broadcast.
        """
        if prediction.shape != clean.shape:
            raise ValueError(f"prediction must have the shape of clean, got {prediction.shape=} and {clean.shape=}")
        target = self.target(clean, noise, times)
        error = (prediction.to(target.dtype) - target).square().flatten(1).mean(1)
        return error * self.weight(times).to(error)

    def clean_from(self, prediction: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """The clean sample that a prediction stands for."""
        a, b, c, d = self._numbers(times)
        scale = a * d - b * c
        return _mix((d / scale, -b / scale), noisy, prediction)

    def step_to(self, prediction: Tensor, noisy: Tensor, times: Tensor, later: Tensor) -> Tensor:
        """The sample at another time, with the clean sample and the noise that a prediction stands for.

        For flow matching this is Euler's step along the path, otherwise DDIM's without added noise (arXiv:2010.02502,
        eq. 12).

        Args:
            later: ``[B]`` times, of less noise when a sample is denoised.
        """
        a, b, c, d = self._numbers(times)
        after, beside, _, _ = self._numbers(later)
        scale = a * d - b * c
        return _mix(((after * d - beside * c) / scale, (beside * a - after * b) / scale), noisy, prediction)

    def _quantile(self, level: Tensor, span: tuple[float, float]) -> Tensor:
        """Times below which a share ``level`` of those in ``span`` lies."""
        raise NotImplementedError

    def _numbers(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``a, b, c, d``, each ``[B]`` float64."""
        raise NotImplementedError


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class FlowMatching(Objective):
    """Straight paths: ``x = (1 - s) x0 + s e``, and the velocity ``e - x0``; a time is the noise level ``s``.

    Args:
        shift: ``s = shift u / (1 + (shift - 1) u)`` moves times towards noise, as long videos need it.
        num_train_timesteps: What ``s`` is multiplied with for the model. integer: Round that down, as UniPC and DPM do
            when they sample.
        logit_normal: Mean and standard deviation of the logit of ``u``; None: ``u`` is uniform.

    Source: arXiv:2210.02747 and arXiv:2209.03003; shift and logit-normal times: arXiv:2403.03206, section 3.1 and
    eq. 23.

    Raises:
        ValueError: ``shift``, ``num_train_timesteps`` or the standard deviation is not positive.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000
    integer: bool = False
    logit_normal: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, value in (("shift", self.shift), ("num_train_timesteps", self.num_train_timesteps)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.logit_normal is not None and not self.logit_normal[1] > 0:
            raise ValueError(f"logit_normal must be a mean and a positive standard deviation, got {self.logit_normal}")

    def timestep(self, times: Tensor) -> Tensor:
        """Float32, or int64 where ``integer``."""
        scaled = times.double() * self.num_train_timesteps
        # Sampling never begins at the very last one: the solvers start just below pure noise.
        return scaled.long().clamp(max=self.num_train_timesteps - 1) if self.integer else scaled.float()

    def share(self, times: Tensor) -> Tensor:
        """``u``, the noise level before the shift."""
        s = times.double()
        return s / (self.shift - (self.shift - 1) * s)

    def at(self, share: Tensor) -> Tensor:
        """Float64 noise levels: the shift of ``u``."""
        return self.shift * share / (1 + (self.shift - 1) * share)

    def _quantile(self, level: Tensor, span: tuple[float, float]) -> Tensor:
        low, high = map(self._share_below, span)
        u = low + (high - low) * level
        if self.logit_normal is not None:
            mean, deviation = self.logit_normal
            u = torch.sigmoid(mean + deviation * torch.special.ndtri(u))
        return self.at(u).clamp(*span)

    def _share_below(self, s: float) -> float:
        """Which share of all times lies below ``s``."""
        u = s / (self.shift - (self.shift - 1) * s)
        if self.logit_normal is None or u in (0.0, 1.0):
            return u
        return NormalDist(*self.logit_normal).cdf(math.log(u / (1 - u)))

    def _numbers(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, one = times.double(), torch.ones_like(times, dtype=torch.float64)
        return 1 - s, s, -one, one


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class _Discrete(Objective):
    """``x = sqrt(r) x0 + sqrt(1 - r) e`` with a table of ``r``; a time is a timestep, -1 the clean sample.

    Args:
        alphas_cumprod: ``[T]`` ``r`` of each timestep, falling within [0, 1].

    Raises:
        ValueError: not such a table.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        r = self.alphas_cumprod
        if r.ndim != 1 or not len(r) or not bool((r.diff() < 0).all() & (r[0] < 1) & (r[-1] >= 0)):
            raise ValueError(f"alphas_cumprod must fall strictly, from below 1 to at least 0, got {r}")

    def timestep(self, times: Tensor) -> Tensor:
        """The times themselves; the first one for the clean sample, which has none."""
        return times.clamp_min(0)

    def share(self, times: Tensor) -> Tensor:
        """``(t + 1) / T``."""
        return (times.double() + 1) / len(self.alphas_cumprod)

    def at(self, share: Tensor) -> Tensor:
        """The nearest timesteps, int64."""
        return (share * len(self.alphas_cumprod)).round().long() - 1

    def _quantile(self, level: Tensor, span: tuple[float, float]) -> Tensor:
        first, end = (math.ceil(share * len(self.alphas_cumprod)) for share in span)
        if first >= end:
            raise ValueError(f"span {span} holds none of {len(self.alphas_cumprod)} timesteps")
        return (first + (end - first) * level).long().clamp(max=end - 1)

    def _path(self, times: Tensor) -> tuple[Tensor, Tensor]:
        table = self.alphas_cumprod.to(times.device, torch.float64)
        r = torch.where(times < 0, 1.0, table[times.clamp_min(0)])
        return r.sqrt(), (1 - r).sqrt()


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class VPrediction(_Discrete):
    """The velocity ``sqrt(r) e - sqrt(1 - r) x0``.

    The published loss of CogVideoX, the squared error of ``x0`` over ``1 - r``, is the squared error of this velocity:
    with ``x0 = sqrt(r) x - sqrt(1 - r) v`` one is the other, and the weight here is 1.

    Source: arXiv:2202.00512, section 4; CogVideoX: arXiv:2408.06072, with the zero terminal SNR of arXiv:2305.08891.
    """

    def _numbers(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, b = self._path(times)
        return a, b, -b, a


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class EpsilonPrediction(_Discrete):
    """The noise ``e``.

    Source: arXiv:2006.11239, eq. 14.

    Raises:
        ValueError: the last timestep holds nothing but noise; predicting it there says nothing of the clean sample.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not float(self.alphas_cumprod[-1]) > 0:
            raise ValueError(
                "alphas_cumprod ends at 0 (rescale_betas_zero_snr): noise prediction learns nothing there; use a "
                "scheduler with v_prediction, or one without the rescaling"
            )

    def _numbers(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, b = self._path(times)
        return a, b, torch.zeros_like(a), torch.ones_like(a)


def objective_of(scheduler: Any, *, shift: float | None = None) -> Objective:
    """The objective that fits a scheduler of diffusers; `dataclasses.replace` sets its options.

    Args:
        scheduler: FlowMatchEuler; UniPC or DPM-Solver++ with flow sigmas; CogVideoX's DDIM or DPM.
        shift: Of flow matching, where training shall differ from sampling; None: the scheduler's. A scheduler that
            shifts by resolution (``mu``) has none of its own: give ``exp(mu)``.

    Raises:
        ValueError: another scheduler, another prediction, or a ``shift`` that is missing or means nothing here.
    """
    config, name = scheduler.config, type(scheduler).__name__
    prediction = config.get("prediction_type")
    if name in _DISCRETE and prediction in ("v_prediction", "epsilon"):
        if shift is not None:
            raise ValueError(f"shift: the timesteps of {name} are not shifted, got {shift!r}")
        made = VPrediction if prediction == "v_prediction" else EpsilonPrediction
        return made(alphas_cumprod=scheduler.alphas_cumprod)
    euler = name in _EULER and not config.invert_sigmas
    if euler or (name in _SOLVERS and prediction == "flow_prediction" and config.use_flow_sigmas):
        if shift is None:
            if config.get("use_dynamic_shifting"):
                raise ValueError(f"this {name} shifts by resolution (use_dynamic_shifting): give shift=exp(mu)")
            shift = scheduler.shift if euler else config.flow_shift
        return FlowMatching(shift=shift, num_train_timesteps=config.num_train_timesteps, integer=not euler)
    settings = {key: config.get(key) for key in ("prediction_type", "use_flow_sigmas", "invert_sigmas")}
    came = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
    raise ValueError(
        f"no training objective is known for {name} ({came}); known are {', '.join(_EULER)} without invert_sigmas, "
        f"{', '.join(_SOLVERS)} with prediction_type='flow_prediction' and use_flow_sigmas=True, and "
        f"{', '.join(_DISCRETE)} with prediction_type='v_prediction' or 'epsilon'"
    )


def _mix(weights: tuple[Tensor, Tensor], first: Tensor, second: Tensor) -> Tensor:
    """``weights[0] first + weights[1] second``, sample by sample, in float32 at least."""
    if first.shape != second.shape or weights[0].shape != first.shape[:1]:
        raise ValueError(
            f"samples must be [B, ...] of one shape and times [B], got {tuple(first.shape)}, {tuple(second.shape)} and "
            f"{tuple(weights[0].shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    left, right = (w.to(first.device, dtype).view(-1, *[1] * (first.ndim - 1)) for w in weights)
    return left * first.to(dtype) + right * second.to(dtype)
