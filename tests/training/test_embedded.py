"""The parts of the embedded model before training, and the loss of its VAE."""

from __future__ import annotations

import math

import torch
from diffusers import WanPipeline

from vsparse.measure.shapes import draw, scenes
from vsparse.training import embedded

CLIPS = draw(scenes()[:2], seed=0, size=32)


def test_every_word_is_one_token_and_keeps_a_direction_of_its_own() -> None:
    tokenizer = embedded.build_tokenizer()
    encoder = embedded.build_text_encoder(tokenizer)
    prompts = [scene.prompt for scene in scenes()]
    ids = tokenizer(prompts, return_tensors="pt").input_ids
    assert ids.shape == (144, 10)  # nine words and the end
    assert tokenizer.unk_token_id not in ids
    assert len({tuple(row.tolist()) for row in ids}) == 144
    assert tokenizer.unk_token_id not in tokenizer("Hello, World").input_ids
    hidden = encoder(ids).last_hidden_state
    for place in range(ids.shape[1]):
        words, mine = ids[:, place].unique(return_inverse=True)
        means = torch.stack([hidden[mine == word, place].mean(0) for word in range(len(words))])
        likeness = torch.cosine_similarity(hidden[:, place, None], means, dim=-1)
        assert torch.equal(likeness.argmax(-1), mine)  # whatever stands around a word


def test_the_same_seed_gives_the_same_parts_and_leaves_the_generator_alone() -> None:
    tokenizer = embedded.build_tokenizer()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for build in (embedded.build_vae, embedded.build_transformer, lambda: embedded.build_text_encoder(tokenizer)):
        first, again = build().state_dict(), build().state_dict()
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.rand(1), expected)


def test_latents_have_the_grid_that_the_transformer_is_trained_on() -> None:
    vae, transformer = embedded.build_vae(), embedded.build_transformer()
    latents = embedded.encode(vae, draw(scenes()[:1], seed=0))
    assert latents.shape == (1, embedded.Z_DIM, 5, 16, 16)
    text = torch.zeros(1, 4, embedded.TEXT_DIM)
    assert not transformer(latents, torch.tensor([500]), text, return_dict=False)[0].any()  # begins at zero


def test_decoding_for_training_is_decoding_without_the_clamp() -> None:
    vae = embedded.build_vae()
    latents = 20 * torch.randn(1, embedded.Z_DIM, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = embedded.decode(vae, latents)
    assert pixels.abs().max() > 1
    assert torch.equal(pixels.clamp(-1, 1), vae.decode(latents).sample)


def test_the_posterior_is_as_wide_as_the_noise_of_training() -> None:
    posterior = embedded.build_vae().encode(CLIPS).latent_dist
    expected = torch.full_like(posterior.std, 2 * math.log(embedded.NOISE)).mul(0.5).exp()
    assert torch.equal(posterior.std, expected)


def test_a_few_steps_of_training_lower_the_loss_and_leave_frozen_parts() -> None:
    vae = embedded.build_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(8):
        loss = embedded.vae_loss(vae, CLIPS, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = vae.state_dict()
    assert torch.equal(after["quant_conv.weight"][embedded.Z_DIM :], before["quant_conv.weight"][embedded.Z_DIM :])
    assert torch.equal(after["quant_conv.bias"][embedded.Z_DIM :], before["quant_conv.bias"][embedded.Z_DIM :])
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name, _ in vae.named_parameters() if ".attentions." not in name} == moved


def test_a_crop_is_a_part_of_its_clip_and_holds_the_shape() -> None:
    clips = draw(scenes()[::24], seed=0, size=64)
    squares = embedded.crops(clips, side=32, generator=torch.Generator().manual_seed(0))
    assert squares.shape == (6, 3, 9, 32, 32)
    for clip, square in zip(clips, squares, strict=True):
        places = clip.unfold(2, 32, 1).unfold(3, 32, 1)  # [3, 9, 33, 33, 32, 32]
        assert (places == square[:, :, None, None]).flatten(4).all(-1).all(0).all(0).any()
        middle = square[:, 4]
        assert (middle.amax(0) - middle.amin(0)).max() > 1


def test_the_parts_make_a_pipeline_that_reads_the_statistics() -> None:
    vae = embedded.build_vae()
    embedded.set_latent_statistics(vae, torch.arange(8.0), torch.full((8,), 2.0))
    assert vae.config.latents_mean == [float(i) for i in range(8)]
    assert vae.config.latents_std == [2.0] * 8
    tokenizer = embedded.build_tokenizer()
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=embedded.build_text_encoder(tokenizer), vae=vae, scheduler=None,
        transformer=embedded.build_transformer(),
    )  # fmt: skip
    assert (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial) == (2, 8)
