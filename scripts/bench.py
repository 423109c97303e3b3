"""Time block-sparse attention against dense SDPA on this machine: `make bench`."""

from __future__ import annotations

import argparse
import platform

import torch
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import vsparse

DENSITIES = (1.0, 0.5, 0.25, 0.125)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 16, 16), metavar=("T", "H", "W"), help="latent size")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least this long per figure")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    dtype = getattr(torch, given.dtype or ("float32" if given.device == "cpu" else "bfloat16"))
    t, h, w = given.grid
    layout = vsparse.RasterLayout(vsparse.Grid(t=t, h=h, w=w), block=given.block).to(given.device)
    blocking = layout.bind()
    generator = torch.Generator(given.device).manual_seed(0)
    shape = (1, layout.slots, given.heads, given.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=given.device, dtype=dtype) for _ in range(3))

    chip = torch.cuda.get_device_name() if given.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}, {chip}")
    print(f"q, k, v {list(shape)} {dtype}, blocks of {given.block}, forward without gradient")
    print(f"{'':>16}  median ms   quartiles ms     to dense   density")

    def line(name: str, density: float, statement: str, names: dict[str, object], dense: float | None) -> float:
        with torch.inference_mode():
            timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
            taken = timer.blocked_autorange(min_run_time=given.seconds)
        low, high = (torch.quantile(torch.tensor(taken.times), share).item() * 1e3 for share in (0.25, 0.75))
        ratio = taken.median / (dense or taken.median)
        print(f"{name:>16}  {taken.median * 1e3:9.2f}   {low:6.2f} - {high:6.2f}   {ratio:8.2f}x   {density:7.3f}")
        return taken.median

    heads_first = {name: x.transpose(1, 2) for name, x in (("q", q), ("k", k), ("v", v))}
    dense = line("dense SDPA", 1.0, "sdpa(q, k, v)", {"sdpa": F.scaled_dot_product_attention, **heads_first}, None)
    for density in DENSITIES:
        kept = max(1, round(density * blocking.blocks))
        scores = torch.rand(1, given.heads, blocking.blocks, blocking.blocks, generator=generator, device=given.device)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(kept).indices, True)
        blocks = vsparse.BlockMap.from_mask(keep, blocking, capacity=kept)
        reasons = vsparse.unsupported(q, k, v, blocks)
        if reasons:
            raise SystemExit("block_sparse_attention cannot run here:\n  - " + "\n  - ".join(reasons))
        names = {"op": vsparse.block_sparse_attention, "q": q, "k": k, "v": v, "blocks": blocks}
        line("block sparse", blocks.density().mean().item(), "op(q, k, v, blocks)", names, dense)


if __name__ == "__main__":
    main()
