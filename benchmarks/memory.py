"""Peak memory of a training step against depth, with activations kept and recomputed by inversion.

    python -m benchmarks.memory --json benchmarks/results/memory.json

Counts the bytes of all tensors alive at once, parameters and data left out, on one thread.
"""

from __future__ import annotations

import argparse
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import pyroflows as pf
from pyroflows.transforms import AffineCoupling, coupling_masks


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._seen:
                self._seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, key, size)
        return out


def stack(depth: int, features: int, reversible: bool, seed: int = 0) -> pf.Flow:
    """A stack of affine couplings away from the identity."""
    torch.manual_seed(seed)
    masks = coupling_masks("random", features, depth)
    flow = pf.Flow([AffineCoupling(features, mask=mask) for mask in masks], reversible=reversible)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return flow


def step(flow: pf.Flow, x: Tensor) -> tuple[int, list[Tensor]]:
    """Peak bytes and gradients of one training step."""
    parameters = list(flow.parameters())
    with PeakBytes() as meter:
        loss = -flow().log_prob(x).mean()
        grads = torch.autograd.grad(loss, parameters)
    # Gradients of the parameters grow with depth in any scheme.
    return meter.peak - sum(grad.nbytes for grad in grads), list(grads)


def compare(depths: list[int], features: int, batch: int) -> list[dict[str, float]]:
    """One row per depth: peak megabytes of both schemes, and by how much the gradients differ, relatively."""
    rows = []
    x = torch.randn(batch, features, generator=torch.Generator().manual_seed(1))
    for depth in depths:
        kept, expected = step(stack(depth, features, reversible=False), x)
        recomputed, grads = step(stack(depth, features, reversible=True), x)
        both = zip(grads, expected, strict=True)
        difference = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in both)
        rows.append(
            {
                "depth": depth,
                "kept_mb": kept / 1e6,
                "recomputed_mb": recomputed / 1e6,
                "gradient": difference,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", default="4,8,16,32,64")
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = compare(
        [int(depth) for depth in options.depths.split(",")], options.features, options.batch
    )
    print(f"{'layers':>6} {'kept MB':>9} {'recomputed MB':>14} {'gradients differ by':>20}")
    for row in rows:
        print(
            f"{row['depth']:>6} {row['kept_mb']:>9.1f} {row['recomputed_mb']:>14.1f} {row['gradient']:>20.1e}"
        )
    if options.json:
        report = {
            "features": options.features,
            "batch": options.batch,
            "torch": torch.__version__,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
