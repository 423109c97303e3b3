"""Models without weights, from their configuration alone: enough to plan a 14B model on a laptop."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vsparse.measure.checkpoints import CHECKPOINTS, Checkpoint
from vsparse.optional import require

__all__ = ["built", "pipeline_around", "skeleton"]


def skeleton(model: str) -> Any:
    """A pipeline or transformer on the meta device; no weight is read or downloaded.

    Args:
        model: A local folder or hub name of a diffusers pipeline (those of `CHECKPOINTS` are known without the hub), a
            local folder of a transformer, or the class name of a known transformer, which stands for its default
            configuration.

    Returns:
        The pipeline (its transformers and autoencoder on the meta device, text encoders left out), or the transformer.

    Raises:
        ValueError: it is none of these. FileNotFoundError: no such folder, and the hub does not have it or cannot be
            reached.
    """
    diffusers = require("diffusers", "diffusers")
    known = require("vsparse.integrations.diffusers", "diffusers").known()
    if model in known:
        return _on_meta(getattr(diffusers, model), {})
    folder = Path(model)
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        config = _read(folder / "config.json")
        name = str(config.get("_class_name"))
        if name not in known:
            raise ValueError(f"{model}: a {name} is not a known transformer; known: {', '.join(known)}")
        return _on_meta(getattr(diffusers, name), config)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{model}: no model_index.json or config.json in there, so it is no diffusers model")
    if model in CHECKPOINTS and not folder.exists():
        return _published(diffusers, model)
    return _pipeline(diffusers, model, known)


def _published(diffusers: Any, model: str) -> Any:
    """A pipeline of `CHECKPOINTS`."""
    known = CHECKPOINTS[model]
    return _built(diffusers, known, {part: _part(diffusers, *given) for part, given in known.parts.items()})


def built(name: str, *, layers: int, heads: int, head_dim: int) -> Any:
    """A known transformer on the meta device: its default configuration with other attention layers.

    Raises:
        ValueError: no such class.
    """
    diffusers = require("diffusers", "diffusers")
    known = require("vsparse.integrations.diffusers", "diffusers").known()
    if name not in known:
        raise ValueError(f"{name!r} is not a known transformer; known: {', '.join(known)}")
    kind = getattr(diffusers, name)
    single = inspect.signature(kind.__init__).parameters.get("num_single_layers")
    split = {} if single is None else {"num_single_layers": max(0, layers - 1)}
    count = {"num_layers": layers - sum(split.values()), **split}
    return _on_meta(kind, {**count, "num_attention_heads": heads, "attention_head_dim": head_dim})


def pipeline_around(transformer: Any) -> Any:
    """The text-to-video pipeline of a transformer, with its family's usual autoencoder and nothing else.

    Raises:
        ValueError: no pipeline of `CHECKPOINTS` runs such a transformer.
    """
    diffusers, name = require("diffusers", "diffusers"), type(transformer).__name__
    for known in CHECKPOINTS.values():
        if known.parts["transformer"][0] == name:
            return _built(diffusers, known, {"transformer": transformer, "vae": _part(diffusers, *known.parts["vae"])})
    raise ValueError(f"no text-to-video pipeline is known that runs a {name}")


def _built(diffusers: Any, known: Checkpoint, parts: Mapping[str, Any]) -> Any:
    pipeline = getattr(diffusers, known.pipeline)
    options = {**dict.fromkeys(_arguments(pipeline, required=True)), **known.options}
    return pipeline(**{**options, **parts})


def _part(diffusers: Any, name: str, config: Mapping[str, Any]) -> Any:
    return _on_meta(getattr(diffusers, name), config)


def _arguments(pipeline: Any, *, required: bool = False) -> list[str]:
    found = list(inspect.signature(pipeline.__init__).parameters.values())[1:]
    return [one.name for one in found if not required or one.default is inspect.Parameter.empty]


def _pipeline(diffusers: Any, model: str, known: list[str]) -> Any:
    try:
        index = diffusers.DiffusionPipeline.load_config(model)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{model}: no such folder, and not found on the hub ({reason})") from error
    name = str(index.get("_class_name"))
    pipeline = getattr(diffusers, name, None)
    if pipeline is None:
        raise ValueError(f"{model}: this diffusers ({diffusers.__version__}) has no {name}")
    given: dict[str, Any] = {}
    for part in _arguments(pipeline):
        value = index.get(part)
        if isinstance(value, list | tuple) and len(value) == 2:
            given[part] = _component(diffusers, model, part, value[1], known)
        elif part in index:
            given[part] = value
    return pipeline(**given)


def _component(diffusers: Any, model: str, part: str, name: str | None, known: list[str]) -> Any:
    """A transformer or an autoencoder on the meta device, a scheduler; None for everything else."""
    found = None if name is None else getattr(diffusers, name, None)
    if found is None:
        return None
    if name in known or (name or "").startswith("AutoencoderKL"):
        return _on_meta(found, found.load_config(model, subfolder=part))
    if part == "scheduler":
        return found.from_pretrained(model, subfolder=part)
    return None


def _on_meta(kind: Any, config: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return kind.from_config(dict(config)) if config else kind()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read it as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
