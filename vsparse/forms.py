"""What follows from a grid and need not be made twice: layouts, static maps, budgets, and why a kernel refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Layout
from vsparse.methods.base import SparseAttention, static_maps
from vsparse.methods.budgets import Density, as_tensor
from vsparse.reasons import grid_reasons, kernel_reasons

__all__ = ["Forms"]

_GRIDS = 8


class Forms:
    """Of the sites of one root. Compiled graphs guard on layouts and maps: sites with equal ones share them."""

    def __init__(self, sites: Sequence[SparseAttention]) -> None:
        self._sites = sites
        self._layouts: dict[tuple[Grid, int, torch.device], Layout] = {}
        self._maps: dict[tuple[object, torch.device, int], BlockMap | None] = {}
        self._reasons: dict[tuple[object, ...], list[str]] = {}
        self._budgets: dict[tuple[Density, torch.device], Tensor] = {}

    def shrink(self) -> None:
        """Forget the grids once there are many."""
        if len(self._layouts) > _GRIDS * len(self._sites):
            self._layouts.clear()
            self._maps.clear()

    def layout(self, grid: Grid, site: SparseAttention, device: torch.device) -> Layout:
        """The layout of a site."""
        key = (grid, site.site.layer, device)
        if key not in self._layouts:
            layout = site.method.layout(grid, site.site)
            same = (x for k, x in self._layouts.items() if k[2] == device and x.key == layout.key)
            self._layouts[key] = next(same, None) or layout.to(device)
        return self._layouts[key]

    def static(self, layout: Layout, site: SparseAttention) -> BlockMap | None:
        """The static map of a site on its layout's device."""
        device = layout.length.device
        if (layout.key, device, site.site.layer) not in self._maps:
            sites = [s for s in self._sites if self.layout(layout.grid, s, device).key == layout.key]
            found = static_maps(sites, layout)
            self._maps |= {(layout.key, device, layer): blocks for layer, blocks in found.items()}
        return self._maps[layout.key, device, site.site.layer]

    def budget(self, density: Density, device: torch.device) -> Tensor:
        """A density as `Call.density`, of all heads."""
        if not isinstance(density, tuple):
            # full, not tensor: a fill is launched on the device, a copy from the host would wait for it.
            return torch.full((), density, dtype=torch.float64, device=device)
        if (density, device) not in self._budgets:
            with torch.inference_mode(False):
                self._budgets[density, device] = as_tensor(density, device)
        return self._budgets[density, device]

    def unsupported(
        self, sites: Sequence[SparseAttention], grid: Grid, device: torch.device, dtype: torch.dtype
    ) -> list[str]:
        """Why some sites cannot run, asked once for each layout and dtype."""
        found: list[str] = []
        kinds = {(self.layout(grid, site, device), site.method): site for site in sites}
        for (layout, method), site in kinds.items():
            key = (layout.key, method, device, dtype)
            if key not in self._reasons:
                self._reasons[key] = kernel_reasons(method, layout, site.site, dtype, device)
            found += [*grid_reasons(method, layout.grid), *self._reasons[key]]
        return found
