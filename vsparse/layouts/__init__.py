"""Orders and blockings: where each token sits while attention works on blocks, and how it gets back."""

from vsparse.layouts.base import Blocking, Layout
from vsparse.layouts.clusters import ClusterLayout, arrange
from vsparse.layouts.curve import CurveLayout
from vsparse.layouts.kinds import PartitionLayout, RasterLayout, TileLayout

__all__ = [
    "Blocking",
    "ClusterLayout",
    "CurveLayout",
    "Layout",
    "PartitionLayout",
    "RasterLayout",
    "TileLayout",
    "arrange",
]
