"""Measure how fast the processes of torchrun send and compute, for `vsparse plan --gpus N --rates FILE`.

`torchrun --nproc-per-node 8 scripts/measure_rates.py --out rates.json`, with as many processes as a node has GPUs, on
one node or on several: the link between nodes is measured where there are any. Gloo on CPUs, NCCL on GPUs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from vsparse.measure.rates import cluster_of, measure
from vsparse.measure.recall_report import as_rows, write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("rates.json"), metavar="FILE")
    given = parser.parse_args()
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) < 2:
        parser.error("start it with torchrun --nproc-per-node N, two processes at least")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        console = Console(quiet=dist.get_rank() > 0)
        if not console.quiet:
            given.out.parent.mkdir(parents=True, exist_ok=True)
        with console.status("") as status:
            command = shlex.join(["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}", *sys.argv])
            per_node = int(os.environ["LOCAL_WORLD_SIZE"])
            report = measure(device, per_node=per_node, command=command, told=status.update)
        if not console.quiet:
            write_text(given.out, as_rows(report))
        for line in cluster_of(report).assumptions():
            console.print(line, highlight=False, soft_wrap=True)
        console.print(f"wrote {given.out}", highlight=False, soft_wrap=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
