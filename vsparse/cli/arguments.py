"""Arguments that several commands take, and long ones: one name for each, with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from vsparse.cli.common import typer

__all__ = [
    "INSIDE",
    "MACHINE",
    "SEE",
    "SEVERAL",
    "SPARSITY",
    "USE",
    "VIDEO",
    "AnyModel",
    "Batch",
    "DenseLayers",
    "DenseSteps",
    "Device",
    "Dtype",
    "Frames",
    "GpuMemory",
    "Gpus",
    "Guidance",
    "Height",
    "Lenient",
    "Links",
    "MethodKey",
    "Model",
    "Offload",
    "OwnModel",
    "Rates",
    "SearchAt",
    "Seed",
    "Settings",
    "Shared",
    "Steps",
    "Width",
]

SEE, USE, INSIDE = "See it work", "Use it on your model", "Look inside"
SPARSITY, VIDEO, MACHINE, SEVERAL = "Sparsity", "Video (default: the pipeline's own)", "Where it runs", "Several GPUs"
MethodKey = Annotated[
    str,
    typer.Option(
        "--method", "-m", metavar="KEY", help="See `vsparse methods`; or a profile's file.", rich_help_panel=SPARSITY
    ),
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set", "-s", metavar="NAME=VALUE", help="An option of the method; repeatable.", rich_help_panel=SPARSITY
    ),
]
DenseSteps = Annotated[
    float | None,
    typer.Option(metavar="SHARE", min=0, max=1, help="Dense steps, from the start.", rich_help_panel=SPARSITY),
]
DenseLayers = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Dense layers, from the first.", rich_help_panel=SPARSITY)
]
SearchAt = Annotated[
    str | None,
    typer.Option(metavar="SHARE,...", help="Steps at which maps are searched anew.", rich_help_panel=SPARSITY),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the noise.")]
Height = Annotated[int | None, typer.Option(metavar="N", min=1, help="Pixels.", rich_help_panel=VIDEO)]
Width = Annotated[int | None, typer.Option(metavar="N", min=1, help="Pixels.", rich_help_panel=VIDEO)]
Frames = Annotated[int | None, typer.Option(metavar="N", min=1, help="Frames.", rich_help_panel=VIDEO)]
Steps = Annotated[int | None, typer.Option(metavar="N", min=1, help="Denoising steps.", rich_help_panel=VIDEO)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or hub name of a diffusers pipeline.")]
AnyModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub name of a pipeline, or a transformer's class name.")
]
OwnModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Folder or hub name of a pipeline; none: the embedded one.", show_default=False
    ),
]
Batch = Annotated[
    int, typer.Option(metavar="N", min=1, help="Samples per step; 2 for a pair of guidance.", rich_help_panel=VIDEO)
]
Gpus = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Choose how N GPUs share each video.", rich_help_panel=SEVERAL),
]
Rates = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What scripts/measure_rates.py has measured.", rich_help_panel=SEVERAL),
]
Links = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Assumed without --rates: nvlink4 (default) or pcie5.", rich_help_panel=SEVERAL),
]
GpuMemory = Annotated[
    float | None,
    typer.Option(
        metavar="GIB", help="Of each GPU; half of what CUDA leaves bounds one attention.", rich_help_panel=SEVERAL
    ),
]
Guidance = Annotated[float | None, typer.Option(metavar="X", help="Guidance scale.", rich_help_panel=VIDEO)]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="float32, bfloat16 or float16; on CUDA bfloat16.", rich_help_panel=MACHINE),
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 ...", rich_help_panel=MACHINE)]
Offload = Annotated[bool, typer.Option("--offload", help="Keep idle parts in CPU memory.", rich_help_panel=MACHINE)]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="Where sparse cannot run, run dense and say so.", rich_help_panel=MACHINE)
]
Shared = Annotated[
    str | None,
    typer.Option(
        metavar="ulysses=N,ring=N", help="Share each video between processes of torchrun.", rich_help_panel=MACHINE
    ),
]
