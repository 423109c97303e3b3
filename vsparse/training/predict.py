"""What a training step will need: memory and time on one GPU, from the settings alone, without weights or data."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from vsparse.host import TrainingHost, training_host
from vsparse.measure.meter import Meter
from vsparse.measure.skeleton import skeleton
from vsparse.patch import Patch
from vsparse.training.data.buckets import Bucket
from vsparse.training.optimisers import make_optimisers
from vsparse.training.settings import Settings
from vsparse.training.student import DTYPES, make_ready

__all__ = ["DEVICES", "Device", "Prediction", "bring_to_cpu", "predict_step", "twin_on_meta"]


@dc.dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU and how much of it a step gets; the three shares are assumptions, not measurements.

    Args:
        name: What to call it. memory: bytes. peak: dense bfloat16 FLOP/s of its data sheet.
        spare: Share of the memory that tensors cannot have: CUDA's context, workspaces, fragments.
        efficiency: Share of ``peak`` that layers and full attention reach. sparse: that sparse attention reaches.

    Raises:
        ValueError: a number that is not positive, a share above 1.
    """

    name: str
    memory: int
    peak: float
    spare: float = 0.1
    efficiency: float = 0.5
    sparse: float = 0.3

    def __post_init__(self) -> None:
        for name in ("memory", "peak", "spare", "efficiency", "sparse"):
            value = getattr(self, name)
            if not value > 0 or (name not in ("memory", "peak") and value > 1):
                raise ValueError(f"device: {name} must be positive and a share at most 1, got {value!r}")


DEVICES = (
    Device(name="RTX 4090, 24 GB", memory=24 * 2**30, peak=165e12),
    Device(name="L40S, 48 GB", memory=48 * 2**30, peak=362e12),
    Device(name="H100, 80 GB", memory=80 * 2**30, peak=989e12),
)
"""One of each size; peaks from NVIDIA's data sheets, without structured sparsity."""


@dc.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Bytes of tensors and FLOPs of one optimiser step of one process.

    Args:
        weights: Of the transformer with everything that was put into it. gradients: of what learns. optimiser: its
            state. average: of the moving average of the weights.
        saved: What a forward keeps for its backward; with checkpointing, the inputs of the blocks.
        step: The most that forward and backward hold at once, gradients included.
        update: What the optimiser holds beside its state while it moves the weights.
        layers, attention, method: FLOPs, recomputation included. ``attention`` is the full or the sparse one, and the
            cross-attention; ``method`` what the method adds: scores, gates, predictors.
        sparse: Whether a method runs, whose rate is another.
    """

    weights: int
    gradients: int
    optimiser: int
    average: int
    saved: int
    step: int
    update: int
    layers: float
    attention: float
    method: float
    sparse: bool

    @property
    def memory(self) -> int:
        """The most bytes at once."""
        return self.weights + self.optimiser + self.average + max(self.step, self.gradients + self.update)

    def fits(self, device: Device) -> bool:
        """Whether that is less than what tensors can have of a device."""
        return self.memory <= (1.0 - device.spare) * device.memory

    def seconds(self, device: Device) -> float:
        """Of one step, at the rates that are assumed for a device; moving weights and waiting for data aside."""
        rate = device.sparse if self.sparse else device.efficiency
        return ((self.layers + self.method) / device.efficiency + self.attention / rate) / device.peak


def predict_step(settings: Settings, bucket: Bucket, *, pipe: Any = None) -> Prediction:
    """Run a step of a run on tensors without values, as it would run on one GPU, and count.

    Weights have the dtypes that `load_student` gives them on a GPU; the encoders are not on it, and neither is what a
    kernel needs for itself. A ramp counts at its end, where the density is that of the method.

    Args:
        settings: Of the run. bucket: size of its videos.
        pipe: Its pipeline, with or without weights; None: read from ``settings.model.path``, configurations only.

    Raises:
        ValueError: settings or a size that do not fit the model, or a model whose forward reads values.
        FileNotFoundError: no such pipeline.
    """
    if settings.train.context_parallel:
        raise ValueError("train: a step is predicted for one process with a whole video; leave context_parallel out")
    pipe = skeleton(settings.model.path) if pipe is None else pipe
    side = training_host(pipe)
    model = getattr(pipe, settings.model.transformer, None)
    if model is None:
        raise ValueError(f"model: {settings.model.path} has no {settings.model.transformer}")
    method = dc.replace(settings.method, dense_steps=0, ramp_steps=0, ramp_stairs=None, adapter=None)
    frozen = torch.float32 if settings.model.train == "full" else DTYPES[settings.model.frozen]
    passes = min(2, settings.train.accumulate)  # in the second micro-batch the gradients are there already
    transformer = twin_on_meta(model, frozen)
    patch, added = make_ready(transformer, settings.model, method, seed=settings.train.seed)
    with FakeTensorMode(allow_non_fake_inputs=True):
        bring_to_cpu(transformer)
        transformer.train()
        noisy, text = side.blank(bucket.frames, bucket.height, bucket.width, batch=settings.data.batch)
        meter, saved = Meter(), 0
        with meter, meter.at(patch.sites if patch else ()):
            for _ in range(passes):
                with meter.tidy(), torch.autocast("cpu", torch.bfloat16, enabled=settings.train.precision == "bf16"):
                    loss = _loss(side, transformer, patch, noisy, text)
                saved = saved or meter.alive
                loss.backward()
                del loss
        optimisers = make_optimisers(transformer.named_parameters(), settings.optimiser, added=added)
        gradients = sum(x.nbytes for x in transformer.parameters() if x.requires_grad)
        return Prediction(
            weights=sum(x.nbytes for x in (*transformer.parameters(), *transformer.buffers())),
            gradients=gradients,
            optimiser=sum(_state_bytes(x) for x in optimisers),
            average=gradients if settings.train.average else 0,
            saved=saved,
            step=meter.peak,
            update=sum(_update_bytes(x) for x in optimisers),
            sparse=patch is not None,
            **{part: flops * settings.train.accumulate / passes for part, flops in meter.flops.items()},
        )


def twin_on_meta(model: Any, dtype: torch.dtype) -> Any:
    """A twin of a model by its configuration, with weights of a dtype, those aside that diffusers keeps in float32."""
    with torch.device("meta"):
        twin = type(model).from_config(dict(model.config))
    kept = (twin._keep_in_fp32_modules or ()) if dtype.itemsize < 4 else ()
    for name, parameter in twin.named_parameters():
        if not set(kept) & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return twin


def bring_to_cpu(model: nn.Module) -> None:
    """Tensors without values on the CPU, whose attention is a fused one; that of the meta device is not."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def _loss(
    side: TrainingHost, transformer: nn.Module, patch: Patch | None, noisy: Tensor, text: Mapping[str, Tensor]
) -> Tensor:
    """A squared error, and what the method asks for."""
    try:
        found = side.forward(transformer, noisy, torch.zeros(len(noisy)), text)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        name = type(transformer).__name__
        raise ValueError(f"{name} reads values in its forward ({error}): only a run can tell what it needs") from error
    extra = () if patch is None else patch.auxiliary_losses().values()
    return sum(extra, (found.float() - noisy).square().mean())


def _state_bytes(optimiser: torch.optim.Optimizer) -> int:
    """Two moments and a count of steps for each parameter of AdamW, one momentum for Muon's."""
    sizes = _sizes(optimiser)
    return sum(sizes) if isinstance(optimiser, torch.optim.Muon) else 2 * sum(sizes) + 4 * len(sizes)


def _update_bytes(optimiser: torch.optim.Optimizer) -> int:
    """On a GPU, AdamW takes the roots of all second moments at once; Muon works on one matrix after the other."""
    sizes = _sizes(optimiser)
    return 3 * max(sizes) if isinstance(optimiser, torch.optim.Muon) else sum(sizes)


def _sizes(optimiser: torch.optim.Optimizer) -> list[int]:
    return [x.nbytes for group in optimiser.param_groups for x in group["params"]]
