"""Small but genuine diffusers hosts, built offline: transformers with inputs that fit them, and whole pipelines.

Weights are random from a seed, then `enliven` makes attention matter: logits of a natural spread, gates that are not
near zero. A wrong attention therefore shows in the output. The global random generator does not move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[..., dict[str, Any]]
Size = tuple[int, int, int]

TEXT_DIM = 32
POOLED_DIM = 16
IMAGE_DIM = 24
GUIDANCE = 6000.0

_NORMS = {"norm_q", "norm_k", "norm_added_q", "norm_added_k"}
_GATES = {"scale_shift_table", "time_proj", "to_out", "to_add_out"}
_SCALED = {"linear.weight", "linear.bias", "proj_out.weight"}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A seed for code that can only draw from the global generator, which is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def enliven(model: nn.Module, *, sharpness: float = 1.6, gate: float = 3.0, seed: int = 0) -> nn.Module:
    """Make attention matter to the output of a freshly initialised transformer, in place.

    Args:
        sharpness: Weight of the query and key norms; logits of normalised heads then spread by about its square.
        gate: Factor on modulations (adaptive norms, gates of residual branches) and on attention output projections.
    """
    with seeded(seed), torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = name.split(".")
            if "token_refiner" in owner:
                continue
            if _NORMS & set(owner):
                if owner[-1] == "weight":
                    parameter.fill_(sharpness).add_(torch.randn_like(parameter), alpha=0.1)
            elif _GATES & set(owner) or ".".join(owner[-2:]) in _SCALED:
                parameter.mul_(gate)
    return model


def _noise(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Noise that is smooth in its last two axes, so that neighbouring video tokens resemble each other."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) == 5:
        wide = nn.functional.avg_pool2d(x.flatten(0, 2), 3, 1, 1, count_include_pad=False).view(shape)
        x = 0.6 * x + 1.5 * wide
    return x.to(dtype)


def _prefix(lengths: Sequence[int], slots: int, batch: int) -> Tensor:
    """``[B, slots]`` int64 mask whose first ``lengths[b]`` entries are 1."""
    if len(lengths) != batch or not all(0 <= n <= slots for n in lengths):
        raise ValueError(f"text_lengths must be {batch} integers in [0, {slots}], got {tuple(lengths)}")
    return (torch.arange(slots)[None] < torch.tensor(lengths)[:, None]).long()


# ---- transformers ------------------------------------------------------------------------------------------------


def wan(
    *,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 64,
    channels: int = 4,
    out_channels: int | None = None,
    patch: Size = (1, 2, 2),
    image: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, Inputs]:
    """`WanTransformer3DModel`: video tokens only in self-attention, text by cross-attention.

    Args:
        image: The Wan 2.1 image-to-video form, with image tokens in the cross-attention.

    Returns:
        The model in evaluation mode, and ``inputs(batch, grid, text_lengths, ...)`` for its forward; ``grid`` counts
        latent frames, rows and columns after patchify.
    """
    from diffusers import WanTransformer3DModel

    extra = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": heads * head_dim} if image else {}
    with seeded(seed):
        model = WanTransformer3DModel(
            patch_size=patch,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=channels,
            out_channels=out_channels or channels,
            text_dim=TEXT_DIM,
            freq_dim=256,
            ffn_dim=2 * heads * head_dim,
            num_layers=layers,
            cross_attn_norm=True,
            rope_max_seq_len=64,
            **extra,
        )
    return enliven(model, seed=seed + 1).eval(), _wan_inputs(channels, patch, image=image)


def wan_vace(
    *,
    layers: int = 3,
    vace_layers: Sequence[int] = (0, 2),
    heads: int = 2,
    head_dim: int = 64,
    channels: int = 4,
    control_channels: int = 12,
    patch: Size = (1, 2, 2),
    seed: int = 0,
) -> tuple[nn.Module, Inputs]:
    """`WanVACETransformer3DModel`: two stacks of blocks, the second fed by a control video."""
    from diffusers import WanVACETransformer3DModel

    with seeded(seed):
        model = WanVACETransformer3DModel(
            patch_size=patch,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=channels,
            out_channels=channels,
            text_dim=TEXT_DIM,
            freq_dim=256,
            ffn_dim=2 * heads * head_dim,
            num_layers=layers,
            cross_attn_norm=True,
            rope_max_seq_len=64,
            vace_layers=list(vace_layers),
            vace_in_channels=control_channels,
        )
    return enliven(model, seed=seed + 1).eval(), _wan_inputs(channels, patch, control=control_channels)


def _wan_inputs(channels: int, patch: Size, *, image: bool = False, control: int = 0) -> Inputs:
    def inputs(
        batch: int = 1,
        grid: Size = (3, 8, 8),
        text_lengths: Sequence[int] | None = None,
        *,
        text_slots: int = 512 if image else 16,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        size = tuple(n * p for n, p in zip(grid, patch, strict=True))
        text = _noise(batch, text_slots, TEXT_DIM, seed=seed + 1, dtype=dtype)
        if text_lengths is not None:
            text = text * _prefix(text_lengths, text_slots, batch)[..., None]
        values: dict[str, Any] = {
            "hidden_states": _noise(batch, channels, *size, seed=seed, dtype=dtype),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": text,
            "return_dict": False,
        }
        if image:
            values["encoder_hidden_states_image"] = _noise(batch, 257, IMAGE_DIM, seed=seed + 2, dtype=dtype)
        if control:
            values["control_hidden_states"] = _noise(batch, control, *size, seed=seed + 3, dtype=dtype)
        return values

    return inputs


def hunyuan_video(
    *,
    layers: int = 1,
    single_layers: int = 1,
    heads: int = 2,
    head_dim: int = 64,
    channels: int = 4,
    seed: int = 0,
) -> tuple[nn.Module, Inputs]:
    """`HunyuanVideoTransformer3DModel`: joint attention, video first, padded text last (double, then single blocks)."""
    from diffusers import HunyuanVideoTransformer3DModel

    with seeded(seed):
        model = HunyuanVideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=layers,
            num_single_layers=single_layers,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=POOLED_DIM,
            rope_axes_dim=_rope_axes(head_dim),
        )

    def inputs(
        batch: int = 1,
        grid: Size = (3, 8, 8),
        text_lengths: Sequence[int] | None = None,
        *,
        text_slots: int = 20,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        t, h, w = grid
        lengths = [text_slots - 3] * batch if text_lengths is None else text_lengths
        return {
            "hidden_states": _noise(batch, channels, t, 2 * h, 2 * w, seed=seed, dtype=dtype),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": _noise(batch, text_slots, TEXT_DIM, seed=seed + 1, dtype=dtype),
            "encoder_attention_mask": _prefix(lengths, text_slots, batch),
            "pooled_projections": _noise(batch, POOLED_DIM, seed=seed + 2, dtype=dtype),
            "guidance": torch.full((batch,), GUIDANCE, dtype=dtype),
            "return_dict": False,
        }

    return enliven(model, seed=seed + 1).eval(), inputs


def hunyuan_video15(
    *,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 64,
    channels: int = 4,
    out_channels: int | None = None,
    patch: int = 1,
    seed: int = 0,
) -> tuple[nn.Module, Inputs]:
    """`HunyuanVideo15Transformer3DModel`: joint attention, video first; valid text is moved before padding inside."""
    from diffusers import HunyuanVideo15Transformer3DModel

    with seeded(seed):
        model = HunyuanVideo15Transformer3DModel(
            in_channels=channels,
            out_channels=out_channels or channels,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=layers,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=patch,
            text_embed_dim=TEXT_DIM,
            text_embed_2_dim=POOLED_DIM,
            image_embed_dim=IMAGE_DIM,
            rope_axes_dim=_rope_axes(head_dim),
            target_size=16,
            task_type="t2v",
        )

    def inputs(
        batch: int = 1,
        grid: Size = (3, 8, 8),
        text_lengths: Sequence[int] | None = None,
        *,
        text_slots: int = 12,
        glyph_lengths: Sequence[int] | None = None,
        glyph_slots: int = 4,
        image_slots: int = 3,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        t, h, w = grid
        lengths = [text_slots - 3] * batch if text_lengths is None else text_lengths
        glyphs = [glyph_slots - 2] * batch if glyph_lengths is None else glyph_lengths
        return {
            "hidden_states": _noise(batch, channels, t, patch * h, patch * w, seed=seed, dtype=dtype),
            "timestep": torch.full((batch,), 500.0, dtype=dtype),
            "encoder_hidden_states": _noise(batch, text_slots, TEXT_DIM, seed=seed + 1, dtype=dtype),
            "encoder_attention_mask": _prefix(lengths, text_slots, batch),
            "encoder_hidden_states_2": _noise(batch, glyph_slots, POOLED_DIM, seed=seed + 2, dtype=dtype),
            "encoder_attention_mask_2": _prefix(glyphs, glyph_slots, batch),
            "image_embeds": torch.zeros(batch, image_slots, IMAGE_DIM, dtype=dtype),
            "return_dict": False,
        }

    return enliven(model, seed=seed + 1).eval(), inputs


def cogvideox(
    *,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 64,
    channels: int = 4,
    text_slots: int = 8,
    rotary: bool = True,
    seed: int = 0,
) -> tuple[nn.Module, Inputs]:
    """`CogVideoXTransformer3DModel`: joint attention, text first and never masked; latents are [B, F, C, H, W].

    Args:
        rotary: Rotary positions (5B models); without them positions are added to the embeddings (2B model).
    """
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    with seeded(seed):
        model = CogVideoXTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=channels,
            out_channels=channels,
            time_embed_dim=32,
            text_embed_dim=TEXT_DIM,
            num_layers=layers,
            sample_width=16,
            sample_height=16,
            sample_frames=9,
            patch_size=2,
            patch_size_t=None,
            temporal_compression_ratio=4,
            max_text_seq_length=text_slots,
            use_rotary_positional_embeddings=rotary,
        )

    def inputs(
        batch: int = 1,
        grid: Size = (3, 8, 8),
        text_lengths: Sequence[int] | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        if text_lengths is not None and any(n != text_slots for n in text_lengths):
            raise ValueError(f"CogVideoX attends to all its {text_slots} text slots, got text_lengths={text_lengths}")
        t, h, w = grid
        values: dict[str, Any] = {
            "hidden_states": _noise(batch, t, channels, 2 * h, 2 * w, seed=seed, dtype=dtype),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": _noise(batch, text_slots, TEXT_DIM, seed=seed + 1, dtype=dtype),
            "return_dict": False,
        }
        if rotary:
            values["image_rotary_emb"] = get_3d_rotary_pos_embed(
                embed_dim=head_dim, crops_coords=((0, 0), (h, w)), grid_size=(h, w), temporal_size=t
            )
        return values

    return enliven(model, seed=seed + 1).eval(), inputs


def _rope_axes(head_dim: int) -> Size:
    """Rotary channels of frames, rows and columns: even, and together one head."""
    side = head_dim * 7 // 16 // 2 * 2
    return head_dim - 2 * side, side, side


HOSTS: dict[str, Callable[..., tuple[nn.Module, Inputs]]] = {
    "wan": wan,
    "wan_vace": wan_vace,
    "hunyuan_video": hunyuan_video,
    "hunyuan_video15": hunyuan_video15,
    "cogvideox": cogvideox,
}
