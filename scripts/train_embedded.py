"""Train the embedded model, stage by stage: `python scripts/train_embedded.py vae out/embedded`.

`vae` trains the VAE and writes it with tokenizer and text encoder, `latents` encodes the clips that the transformer is
trained on, `transformer` trains it, `pack` writes the pipeline in bfloat16, `judge` generates held-out prompts and
measures whether they are followed; `all` does all of them. Steps and seeds are fixed; a stopped run goes on from its
last checkpoint.
"""

import argparse
import dataclasses as dc
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vsparse.host import training_host
from vsparse.measure.adherence import adherence, summary
from vsparse.measure.embedded import EMBEDDED
from vsparse.measure.pipelines import generate
from vsparse.measure.shapes import Scene, draw, held_out, scenes, training_scenes
from vsparse.training import embedded
from vsparse.training.draws import Draws
from vsparse.training.files import whole_folder
from vsparse.training.loop import Trainer, TrainSettings
from vsparse.training.objective import objective_of
from vsparse.training.optimisers import OptimiserSettings
from vsparse.training.task import Denoising, Sample

STEPS = 1200
SHORT = 800  # of these, with 5 frames of 9: enough for what lies within, at half the price
BATCH = 8
SIDE = 64
RATE = 3e-3
WARMUP = 20
EVERY = 50  # steps between checkpoints
TRAINING, LATENTS, TEST = 0, 1, 2  # seeds of the clips
CLIPS = 4096
# Of the transformer: steps, latent frames, batch. Pictures first, which teach colours, shapes and grounds at a fifth of
# the price of a clip, then short clips, then whole ones; and once more whole ones from a high rate.
CYCLES = (
    (2e-3, ((300, 1, 40), (300, 3, 13), (1400, 5, 8))),
    (1.5e-3, ((4000, 5, 8),)),
)
FLOW_SHIFT = 4.0
EMPTY_CAPTIONS = 0.1


class Optimizers:
    """Muon on the kernels of convolutions, seen as matrices, and Adam on the rest."""

    def __init__(self, model: nn.Module) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.kernels = [p for p in trained if p.ndim >= 4 and p[0].numel() > 1]
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.kernels]  # the same memory
        muon = torch.optim.Muon(self.matrices, lr=RATE, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        others = [p for p in trained if p.ndim < 4 or p[0].numel() == 1]
        self.parts = (muon, torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0))

    def step(self, rate: float) -> None:
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()


def write(value: object, path: Path) -> None:
    """Save under another name first, so that a broken run never leaves half a file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def rate(step: int) -> float:
    return RATE * min(1, (step + 1) / WARMUP) * (0.51 + 0.49 * math.cos(math.pi * step / STEPS))


def train_vae(vae: nn.Module, checkpoint: Path) -> None:
    optimizers, start, known = Optimizers(vae), 0, training_scenes()
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved["step"]
        vae.load_state_dict(saved["model"])
        for part, state in zip(optimizers.parts, saved["optimizers"], strict=True):
            part.load_state_dict(state)
    began = time.perf_counter()
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(step)
        chosen = [known[i] for i in torch.randint(len(known), (BATCH,), generator=generator).tolist()]
        clips = draw(chosen, seed=TRAINING, first=step * BATCH)
        squares = embedded.crops(clips[:, :, :5] if step < SHORT else clips, side=SIDE, generator=generator)
        loss = embedded.vae_loss(vae, squares, generator)
        vae.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizers.step(rate(step))
        if (step + 1) % EVERY == 0:
            states = [part.state_dict() for part in optimizers.parts]
            write({"step": step + 1, "model": vae.state_dict(), "optimizers": states}, checkpoint)
            print(f"step {step + 1} loss {loss.item():.4f} {time.perf_counter() - began:.0f} s", flush=True)


def batches(clips: list[Scene], *, seed: int, size: int = 16) -> Iterator[Tensor]:
    for first in range(0, len(clips), size):
        yield draw(clips[first : first + size], seed=seed, first=first)


def encoded(vae: nn.Module, clips: Iterable[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([embedded.encode(vae, batch) for batch in clips])


def judge(vae: nn.Module) -> Tensor:
    """PSNR in dB of each held-out scene through encoder, posterior mean and decoder."""
    figures = []
    for clips in batches(list(held_out()), seed=TEST, size=8):
        with torch.no_grad():
            error = vae.decode(embedded.encode(vae, clips)).sample - clips
        figures.append(-10 * torch.log10((error / 2).square().mean((1, 2, 3, 4))))
    return torch.cat(figures)


def round_weights(model: nn.Module) -> None:
    """To what bfloat16 holds, as the finished checkpoint will: nothing is trained on other weights."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def stage_vae(folder: Path) -> None:
    vae = embedded.build_vae()
    train_vae(vae, folder / "vae.checkpoint")
    round_weights(vae)
    sample = encoded(vae, batches(list(training_scenes()) * 2, seed=TRAINING))
    embedded.set_latent_statistics(vae, sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4)))
    psnr = judge(vae)
    print(f"PSNR of {len(psnr)} held-out clips: mean {psnr.mean():.2f} dB, worst {psnr.min():.2f} dB")
    vae.save_pretrained(folder / "vae")
    tokenizer = embedded.build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = embedded.build_text_encoder(tokenizer)
    round_weights(encoder)
    encoder.save_pretrained(folder / "text_encoder")


def write_latents(vae: nn.Module, clips: list[Scene], seed: int, path: Path) -> Tensor:
    """Normalised latents `[N, C, T, h, w]` in bfloat16, and the number of each clip's scene in `scenes()`."""
    mean, std = (torch.tensor(x)[:, None, None, None] for x in (vae.config.latents_mean, vae.config.latents_std))
    latents = (encoded(vae, batches(clips, seed=seed)) - mean) / std
    numbers = {scene: i for i, scene in enumerate(scenes())}
    values = {"latents": latents.bfloat16(), "scenes": torch.tensor([numbers[scene] for scene in clips])}
    partial = path.with_name(path.name + ".partial")
    save_file(values, partial, metadata={"seed": str(seed)})
    partial.replace(path)
    return latents


def stage_latents(folder: Path) -> None:
    vae = type(embedded.build_vae()).from_pretrained(folder / "vae")
    seen, unseen = list(training_scenes()), list(held_out())
    clips = (seen * (CLIPS // len(seen) + 1))[:CLIPS]
    latents = write_latents(vae, clips, LATENTS, folder / "latents.safetensors")
    for i, channel in enumerate(latents.unbind(1)):
        low, high = channel.aminmax()
        print(f"channel {i}: mean {channel.mean():.3f} std {channel.std():.3f} from {low:.2f} to {high:.2f}")
    test = [seen[i * len(seen) // 128] for i in range(128)] + (unseen * 6)[:128]
    write_latents(vae, test, TEST, folder / "latents_heldout.safetensors")


def assemble(folder: Path, transformer: Any) -> Any:
    """The pipeline around a transformer, everything in float32."""
    import diffusers
    import transformers

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    return diffusers.WanPipeline(
        tokenizer=transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer"),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder").float().eval(),
        vae=diffusers.AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler=scheduler,
        transformer=transformer,
    )


def source(cycle: int, phases: Any, latents: Tensor, numbers: Tensor, text: dict[str, Tensor]) -> Any:
    """Batches of each step, drawn from the step alone."""
    ends = [(sum(steps for steps, _, _ in phases[: i + 1]), *what) for i, (_, *what) in enumerate(phases)]

    def between(first: int, last: int) -> Iterator[Sample]:
        for step in range(first, last):
            frames, size = next(what for end, *what in ends if step < end)
            chosen = torch.randint(len(latents), (size,), generator=Draws((cycle, "order", step)).generator())
            mine = {name: x[numbers[chosen]] for name, x in text.items()}
            yield Sample(latents=latents[chosen, :, :frames], text=mine, name=f"clips {chosen.tolist()}")

    return between


def stage_transformer(folder: Path) -> None:
    transformer = embedded.build_transformer()
    pipe = assemble(folder, transformer)
    side, stored = training_host(pipe), load_file(folder / "latents.safetensors")
    rows = [side.encode_text([scene.prompt]) for scene in scenes()]
    text = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    began = time.perf_counter()

    def progressed(done: int, figures: Any) -> None:
        if done % 50 == 0:
            print(f"step {done} loss {figures['loss']:.4f} {time.perf_counter() - began:.0f} s", flush=True)

    for cycle, (rate, phases) in enumerate(CYCLES):
        print(f"cycle {cycle + 1} of {len(CYCLES)}", flush=True)
        run = Trainer(
            transformer,
            Denoising(
                forward=side.forward,
                objective=dc.replace(objective_of(pipe.scheduler), stratified=True),
                source=source(cycle, phases, stored["latents"], stored["scenes"], text),
                empty=side.encode_text([""]),
                empty_captions=EMPTY_CAPTIONS,
            ),
            settings=TrainSettings(
                steps=sum(steps for steps, _, _ in phases), seed=cycle, average=0.998, save_every=100
            ),
            optimiser=OptimiserSettings(name="muon", learning_rate=rate, schedule="cosine", warmup=50, final=0.01),
            folder=folder / f"run-{cycle + 1}",
            identity={"phases": phases, "shift": FLOW_SHIFT, "empty_captions": EMPTY_CAPTIONS},
            progressed=progressed,
        )
        run.run()
        run.average.copy_to_model()
    transformer.save_pretrained(folder / "transformer")


def stage_pack(folder: Path) -> None:
    """The whole pipeline in bfloat16, without names of places."""
    import diffusers

    pipe = assemble(folder, diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer"))
    with whole_folder(folder / "tiny_wan") as scratch:
        pipe.to(torch.bfloat16).save_pretrained(scratch)
        for path in scratch.rglob("*config.json"):
            told = json.loads(path.read_text())
            told.pop("_name_or_path", None)
            path.write_text(json.dumps(told, indent=2) + "\n")
        for path in scratch.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    print(f"{folder / 'tiny_wan'}: {size / 1e6:.1f} MB")


def stage_judge(folder: Path) -> None:
    """Held-out prompts, dense, two seeds each."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "tiny_wan")
    pipe.text_encoder.float()
    pipe.set_progress_bar_config(disable=True)
    wanted = [(scene, seed) for seed in (0, 1) for scene in held_out()]
    found = []
    for scene, seed in wanted:
        frames = generate(pipe, prompt=scene.prompt, seed=seed, **dc.asdict(EMBEDDED))
        found.append(adherence(frames, scene))
        if not (found[-1].follows and found[-1].coherent):
            print(f"{scene.prompt}, seed {seed}: {found[-1]}")
    print({name: f"{count} of {len(found)}" for name, count in summary(found).items()})


def main() -> None:
    stages = {
        "vae": stage_vae,
        "latents": stage_latents,
        "transformer": stage_transformer,
        "pack": stage_pack,
        "judge": stage_judge,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*stages, "all"])
    parser.add_argument("folder", type=Path, help="holds checkpoints and results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, stage in stages.items():
        if arguments.stage in (name, "all"):
            print(f"== {name}", flush=True)
            stage(arguments.folder)


if __name__ == "__main__":
    main()
