"""Clips made dense, by another exact kernel and sparse, from the same noise, and measured pair by pair."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vsparse.fingerprint import digest
from vsparse.host import find_roots
from vsparse.measure.calibrate import recording
from vsparse.measure.demo import FLOORS, environment
from vsparse.measure.fidelity.caught import CALLS, recall_of, too_long
from vsparse.measure.fidelity.distance import distance, seen_in
from vsparse.measure.fidelity.result import Fidelity, Kind, Outcome, Ran, Run
from vsparse.measure.fidelity.vbench import Wanted, video, write_prompts
from vsparse.measure.latency.executed import Watcher, watching
from vsparse.measure.paired import Clip, clip_of
from vsparse.measure.recall_report import as_json, write_text
from vsparse.measure.video import write_video
from vsparse.methods import Method, get_method
from vsparse.patch import Patch, apply
from vsparse.profile import Profile
from vsparse.schedule import Schedule

__all__ = ["CLIPS", "DENSE", "Subject", "Told", "exact_floor", "measured"]

DENSE, CLIPS = "dense", "clips"
Told = Callable[[str, int, int], None]


@dc.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is compared with dense: a method or a profile under a name, or a floor."""

    name: str
    method: Method | Profile
    schedule: Schedule
    kind: Kind = "sparse"

    @property
    def chooses(self) -> Method:
        """The method, that of a profile."""
        return self.method.method if isinstance(self.method, Profile) else self.method

    @property
    def words(self) -> str:
        """Method and schedule, and whether the method is meant to be trained."""
        trained = "; meant to be trained, applied as it begins" if self.chooses.paper.trained else ""
        about = f"{self.method}; " if isinstance(self.method, Profile) else ""
        return f"{about}{self.chooses}; {self.schedule}{trained if self.kind == 'sparse' else ''}"


def exact_floor() -> Subject:
    """Dense attention by the other exact kernel: the sparse one with every block kept."""
    trial = next(one for one in FLOORS if one.method != "dense")
    method = get_method(trial.method)().replace(**trial.options)
    return Subject(name="floor", method=method, schedule=Schedule(), kind="floor")


def measured(
    pipe: Any,
    subjects: Sequence[Subject],
    wanted: Sequence[Wanted],
    asked: Mapping[str, Any],
    *,
    folder: Path,
    source: str,
    fps: int,
    told: Told = lambda *_: None,
) -> Fidelity:
    """Make every clip dense and by every subject, compare, and write the videos.

    A clip that this folder holds already, made with the same model, settings and versions, is not made again.

    Args:
        pipe: A diffusers video pipeline; it is left as it came. subjects: what to compare; a floor that cannot run here
            is left out with its reasons, a method is refused. wanted: the clips.
        asked: size, frames, steps, guidance as of `generate`. folder: for videos and figures. source: words for the
            pipeline. fps: of the videos. told: what runs, how many generations are over, how many there are.

    Raises:
        ValueError, NotImplementedError: as of `vsparse.apply` and `generate`, before anything is generated if it is
            the method that is refused.
    """
    refused = {one.name: why for one in subjects if (why := _refusal(pipe, one))}
    run = [one for one in subjects if one.name not in refused]
    settings = {**_settings(pipe, run, asked), "fps": fps}
    count = len(wanted) * (1 + len(run)) + 1
    found = _all_clips(pipe, run, wanted, asked, settings, folder=folder, fps=fps, told=told, count=count)
    write_prompts(folder, wanted)
    lengths = [x.ran.tokens for outcomes in found.values() for x in outcomes.values() if x.ran is not None]
    told("attention recall", count - 1, count)
    caught = _recalls(pipe, run, wanted[0], asked, folder, settings, tokens=max(lengths, default=0))
    told("", count, count)
    words = {DENSE: f"{source}, as it comes", **{one.name: one.words for one in subjects}}
    kinds: dict[str, Kind] = {DENSE: "dense", **{one.name: one.kind for one in subjects}}
    runs = []
    for name in words:
        recall, why = caught.get(name, (None, ""))
        outcomes = found.get(name, {})
        runs.append(
            Run(
                name=name,
                kind=kinds[name],
                words=words[name],
                outcomes=outcomes,
                recall=recall,
                without={key: x for key, x in (("run", refused.get(name)), ("recall", why)) if x},
                videos={clip: video(folder, name, clip) for clip in outcomes},
            )
        )
    return Fidelity(source=source, asked=dict(asked), clips=wanted, runs=runs, environment=environment())


def _all_clips(
    pipe: Any,
    run: Sequence[Subject],
    wanted: Sequence[Wanted],
    asked: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    folder: Path,
    fps: int,
    told: Told,
    count: int,
) -> dict[str, dict[str, Outcome]]:
    """Run -> clip -> what came of it; each clip is written down before the next one begins."""
    found: dict[str, dict[str, Outcome]] = {DENSE: {}, **{one.name: {} for one in run}}
    (folder / CLIPS).mkdir(parents=True, exist_ok=True)
    for i, clip in enumerate(wanted):
        label, over = f"clip {i + 1} of {len(wanted)}", i * (1 + len(run))
        told(f"{label}: looking", over, count)
        known = _known(folder, clip, settings)
        if known is None:
            known = _made(pipe, run, clip, asked, folder=folder, fps=fps, told=_counted(told, label, over, count))
            made = {name: outcome.as_json() for name, outcome in known.items()}
            mine = {**settings, "clip": dc.asdict(clip)}
            write_text(folder / CLIPS / f"{clip.name}.json", as_json({"settings": mine, "runs": made}))
        for name, outcome in known.items():
            found[name][clip.name] = outcome
    return found


def _counted(told: Told, label: str, over: int, count: int) -> Callable[[str, int], None]:
    return lambda name, done: told(f"{label}: {name}", over + done, count)


def _refusal(pipe: Any, subject: Subject) -> str:
    """Why a floor cannot run; a method that cannot is refused at once."""
    try:
        with apply(pipe, subject.method, schedule=subject.schedule):
            return ""
    except (ValueError, NotImplementedError) as error:
        if subject.kind != "floor":
            raise
        return " ".join(str(error).split())


def _made(
    pipe: Any,
    subjects: Sequence[Subject],
    wanted: Wanted,
    asked: Mapping[str, Any],
    *,
    folder: Path,
    fps: int,
    told: Callable[[str, int], None],
) -> dict[str, Outcome]:
    """One clip by every run; the videos are written before it counts as made."""
    given = {**asked, "prompt": wanted.prompt, "seed": wanted.seed}
    told(DENSE, 0)
    dense = clip_of(pipe, given)
    shown: dict[str, Clip] = {DENSE: dense}
    found = {DENSE: Outcome(seen=seen_in(dense.frames, wanted.prompt))}
    for i, subject in enumerate(subjects):
        told(subject.name, i + 1)
        with _watched(pipe, subject, asked.get("steps") or 1) as (patch, watcher):
            clip = clip_of(pipe, given)
            ran = _ran(patch, watcher)
        found[subject.name] = Outcome(distance=distance(clip, dense), seen=seen_in(clip.frames, wanted.prompt), ran=ran)
        shown[subject.name] = dc.replace(clip, latents=())
    for name, clip in shown.items():
        write_video(video(folder, name, wanted.name), clip.frames, fps=fps)
    return found


@contextlib.contextmanager
def _watched(pipe: Any, subject: Subject, steps: int) -> Iterator[tuple[Patch, Watcher]]:
    with apply(pipe, subject.method, schedule=subject.schedule) as patch, watching(pipe, patch, steps) as watcher:
        yield patch, watcher


def _ran(patch: Patch, watcher: Watcher) -> Ran:
    executed = watcher.executed()
    blocks = executed.blocks
    layout = None if blocks is None else blocks.q.layout
    return Ran(
        density=float(patch.stats()["density"]),
        steps=len(executed.density),
        dense_steps=executed.dense_steps,
        layers=len(executed.density[0]) if executed.density else 0,
        dense_layers=executed.dense_layers,
        heads=executed.density,
        tokens=0 if layout is None else layout.tokens,
    )


# ---- what was made before ----------------------------------------------------------------------------------------


def _settings(pipe: Any, subjects: Sequence[Subject], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a clip depends on but its prompt and seed."""
    host, roots = find_roots(pipe)
    told = []
    for root in roots:
        mark = host.fingerprint(root.module)
        told.append([root.name, mark.model, digest(mark), repr(sorted(mark.config.items()))])
    known: Any = roots[0].module
    return {
        "pipeline": type(pipe).__name__,
        "models": told,
        "device": str(pipe.device),
        "dtype": str(known.dtype),
        "asked": {name: asked[name] for name in sorted(asked)},
        "runs": {one.name: one.words for one in subjects},
        "packages": environment()["packages"],
    }


def _known(folder: Path, wanted: Wanted, settings: Mapping[str, Any]) -> dict[str, Outcome] | None:
    """The figures of a clip that was made before with these settings, its videos being there."""
    path = folder / CLIPS / f"{wanted.name}.json"
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text())
        names = {DENSE, *settings["runs"]}
        if told["settings"] != {**settings, "clip": dc.asdict(wanted)} or set(told["runs"]) != names:
            return None
        if not all(video(folder, name, wanted.name).is_file() for name in names):
            return None
        return {name: Outcome.from_json(one) for name, one in told["runs"].items()}
    except (ValueError, KeyError, TypeError):
        return None


def _recalls(
    pipe: Any,
    subjects: Sequence[Subject],
    wanted: Wanted,
    asked: Mapping[str, Any],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    tokens: int,
) -> dict[str, tuple[float | None, str]]:
    """Recall of every method on the dense model's q and k of the first clip."""
    methods = {one.name: one.chooses for one in subjects if one.kind == "sparse"}
    if why := too_long(tokens):
        return dict.fromkeys(methods, (None, why))
    made_with = {**settings, "clip": dc.asdict(wanted), "calls": CALLS}
    path = folder / CLIPS / ".recall.json"
    if path.is_file():
        with contextlib.suppress(ValueError, KeyError):
            told = json.loads(path.read_text())
            if told["settings"] == made_with:
                return {name: (value, why) for name, (value, why) in told["recall"].items()}
    with recording(pipe, most=CALLS, device="cpu") as recorded:
        clip_of(pipe, {**asked, "prompt": wanted.prompt, "seed": wanted.seed})
    found = {name: recall_of(method, recorded) for name, method in methods.items()}
    write_text(path, as_json({"settings": made_with, "recall": found}))
    return found
