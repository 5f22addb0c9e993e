"""Products of a log density's matrix of second derivatives with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .density import LogDensity
from .double import DoubleDensity, site_sizes
from .program import Program
from .sites import LatentSite

__all__ = ["Products", "differentiate", "multiply_hessian", "points_at_once", "slice_rows"]

# Rows of data times points in one product: more leave the cache, and cost thrice as much.
ROWS_AT_ONCE = 2**18
# The most points at once, and how many entries a site has less of in a model of small sites.
MANY, SMALL = 64, 8
# Rows times points at once if an evaluation goes over slices of the rows, and as few points as are
# worth it.
SLICED_ROWS, FEWEST = 2**22, 4
# Numbers in the largest array of products that are taken at once, and how many have to be.
NUMBERS_AT_ONCE, WORTHWHILE = 2**17, 4
# As a model calls it, and as it is called in a graph.
SPLITS = (Tensor.split, torch.ops.aten.split_with_sizes.default)


class Products(NamedTuple):
    """What :func:`multiply_hessian` gives, for points of shape ``(n, features)``.

    Attributes:
        values: The log density, of shape ``(n,)``.
        gradients: Its gradients, of shape ``(n, features)``.
        products: Matrices of second derivatives times vectors, of shape ``(n, k, features)``.
    """

    values: Tensor
    gradients: Tensor
    products: Tensor


def multiply_hessian(
    density: DoubleDensity, points: Tensor, directions: Tensor, held: Set[str] = frozenset()
) -> Products:
    r"""Multiplies the second derivatives of a log density at every point by the same vectors.

    .. math:: \nabla^2 \log p(z)\, v = \nabla_z \bigl(\nabla \log p(z)^\top v\bigr)

    A product costs about as much as a gradient. In double precision a zero among the second
    derivatives is told from a small number.

    Args:
        density: A log density in double precision.
        points: Points of shape ``(n, features)``, in double precision.
        directions: Vectors of shape ``(k, features)``.
        held: Names of sites that are taken for constants, which saves most of the time if rows of
            data share them. Their entries of the results are of no use.

    Returns:
        Values, gradients and products, without a graph; NaN where the model fails.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 0.5))
        >>> density, one = DoubleDensity(LogDensity(model), 1), torch.ones(1, 1).double()
        >>> multiply_hessian(density, one, one).products
        tensor([[[-4.]]], dtype=torch.float64)
    """
    pieces = points.split(density.batch_size)
    parts = [_multiply(density, piece, directions, held) for piece in pieces]
    return Products(*map(torch.cat, zip(*parts, strict=True)))


def points_at_once(density: LogDensity, few: int) -> tuple[int, int]:
    """How many points are evaluated at once: a few, and as many as stay in the cache.

    A graph takes no fewer points than it was recorded for, so there is one of few; but not for a
    model of many small sites, which costs more to record than to evaluate.

    Args:
        density: A log density.
        few: How many are few.

    Returns:
        Both numbers, the smaller first.
    """
    sizes = site_sizes(density)
    many = max(1, min(MANY, ROWS_AT_ONCE // max(density.features, *sizes)))
    return (many if sum(sizes) < SMALL * len(sizes) else min(few, many)), many


def slice_rows(density: LogDensity, most: int = MANY, single: bool = False) -> DoubleDensity | None:
    """The density in double precision, for many points at once by slices of the rows of its data.

    Args:
        density: A log density.
        most: The most points at once.
        single: As in :class:`pyroflows.model.double.DoubleDensity`.

    Returns:
        The density; ``None`` if it has few rows, or is not known to be a sum over them.
    """
    largest = max(density.features, *site_sizes(density))
    count = min(most, SLICED_ROWS // largest)
    if ROWS_AT_ONCE // largest >= count or count < FEWEST:
        return None
    sliced = DoubleDensity(density, count, single)
    return sliced if len(sliced.parts) > 1 else None


class Holding(TorchFunctionMode):
    """Takes some sites for constants in an evaluation of a density.

    A density begins by taking its vector apart, and the parts of these sites are detached then.

    Args:
        sites: The sites of the vector.
        held: The names of some of them.
    """

    def __init__(self, sites: Sequence[LatentSite], held: Set[str]) -> None:
        super().__init__()
        self.sizes = [site.features for site in sites]
        self.held = [site.name in held for site in sites]
        self.found = not held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.found and func in SPLITS and args[1] == self.sizes:
            self.found = True
            parts = zip(result, self.held, strict=True)
            return tuple(part.detach() if held else part for part, held in parts)
        return result


def differentiate(
    density: DoubleDensity, points: Tensor, held: Set[str] = frozenset()
) -> tuple[Tensor, Tensor]:
    """The log density and its gradients.

    Args:
        density: As in :func:`multiply_hessian`.
        points: Points of shape ``(n, features)``, in double precision.
        held: As in :func:`multiply_hessian`.

    Returns:
        Tensors of shape ``(n,)`` and ``(n, features)``, without a graph.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 0.5))
        >>> density, one = DoubleDensity(LogDensity(model), 1), torch.ones(1, 1).double()
        >>> differentiate(density, one)[1]
        tensor([[-4.]], dtype=torch.float64)
    """

    def evaluate(program: Program, points: Tensor) -> tuple[Tensor, Tensor]:
        values = _follow(program, points, density, held)
        return values.detach(), _differentiate(values.sum(), points)

    values, gradients = _add_parts(density, points, evaluate)
    return values, gradients


def _multiply(
    density: DoubleDensity, points: Tensor, directions: Tensor, held: Set[str]
) -> tuple[Tensor, ...]:
    at_once = NUMBERS_AT_ONCE // (density.batch_size * density.largest)

    def evaluate(program: Program, points: Tensor) -> tuple[Tensor, ...]:
        values = _follow(program, points, density, held)
        gradients = _differentiate(values.sum(), points, twice=True)
        products = _multiply_gradients(gradients, points, directions, at_once)
        return values.detach(), gradients.detach(), products.detach()

    return _add_parts(density, points, evaluate)


def _add_parts(
    density: DoubleDensity,
    points: Tensor,
    evaluate: Callable[[Program, Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """The weighted sums of what is evaluated of the parts of a density, one at a time."""
    # A graph that is made later would record what is done to its operations.
    parts = density.parts
    total: list[Tensor] = []
    with torch.enable_grad():
        for weight, program in parts:
            found = evaluate(program, points.detach().requires_grad_())
            scaled = [tensor if len(parts) == 1 else weight * tensor for tensor in found]
            total = [a + b for a, b in zip(total, scaled, strict=True)] if total else scaled
    return tuple(total)


def _follow(program: Program, points: Tensor, density: DoubleDensity, held: Set[str]) -> Tensor:
    """The values of a program, with a graph to all but some sites."""
    with Holding(density.sites, held):
        (values,) = program(points)
    return values


def _multiply_gradients(
    gradients: Tensor, points: Tensor, directions: Tensor, at_once: int
) -> Tensor:
    """The derivatives of gradients ``(n, features)`` in directions, of shape ``(n, k, features)``,
    so many of them at once if that saves many steps."""
    if not gradients.requires_grad or not len(directions):
        return points.new_zeros(len(points), len(directions), points.shape[-1])
    if min(at_once, len(directions)) < WORTHWHILE:
        totals = [(gradients @ direction).sum() for direction in directions]
        return torch.stack([_differentiate(total, points) for total in totals], 1)
    products: list[Tensor] = []
    for chunk in directions.split(at_once):
        weights = chunk.unsqueeze(1).expand(-1, *gradients.shape)
        products += torch.autograd.grad(
            gradients, points, weights, retain_graph=True, is_grads_batched=True
        )
    return torch.cat(products).transpose(0, 1)


def _differentiate(total: Tensor, points: Tensor, twice: bool = False) -> Tensor:
    """The gradient of a number; zero where it does not depend on the points."""
    if not total.requires_grad:
        return torch.zeros_like(points)
    (gradient,) = torch.autograd.grad(
        total, points, create_graph=twice, retain_graph=True, materialize_grads=True
    )
    return gradient
