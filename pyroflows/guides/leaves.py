"""The globals of a model whose locals are not normal but come in small independent blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions.quadrature import HermiteNodes, draw_on_grid
from .marginal import Conditional, Marginal

__all__ = ["FromLaplace", "Leaves", "integrate_leaves", "leaves_are_small"]

# Nodes along each axis, tried in turn, and the most points of all axes together.
COUNTS, MOST_POINTS = (3, 5, 7, 9, 17, 33), 1100
# So many nodes are for heavy tails, and are spread further.
MANY, STRETCH = 17, 0.3
# The deepest blocks for which two numbers of nodes can be compared.
DEEPEST = 4
# Draws need the shape of a density, and not only its integral.
LEAST = 5
# Nodes suffice if the error has so small a mean and standard deviation.
MEAN, DEVIATION = 0.01, 0.02
# Weights that are off by more than this are not those of the posterior.
USABLE = 0.1
# Draws go nowhere where a block is lower than this.
LOWEST = -60.0
# The next number of nodes has at most so small a share of the error.
SHARE = 0.25
# Steps from a reference that is near: the integral does not need the very mode.
STEPS = 2
# Errors are shared out evenly among blocks whose heights are no greater.
USUAL = 10.0
# Where the mean error is so large, in all or for each block, heights are not known from slopes.
WILD, WILD_EACH = 1.0, 0.1
# More nodes are wanted where it is so large at most points.
ROUGH = 1e-3
# Numbers in the arrays of slopes.
NUMBERS_AT_ONCE = 2**22


class FromLaplace:
    """Integrals over locals that begin with Laplace's approximation, and stand in its place where
    the mode of the globals is looked for.

    Attributes:
        marginal: The marginal density by Laplace's approximation.
    """

    marginal: Marginal

    @property
    def features(self) -> int:
        """How many globals there are."""
        return self.marginal.features

    @property
    def initial(self) -> Tensor:
        """The globals at the start of the density."""
        return self.marginal.initial

    @property
    def reference(self) -> Tensor:
        """The locals there."""
        return self.marginal.reference

    @property
    def is_normal(self) -> bool:
        """Whether the locals are normal given the globals."""
        return self.marginal.is_normal


class Leaves(FromLaplace):
    r"""The log density of a model's globals, with small blocks of locals integrated by quadrature.

    Given globals, locals are :math:`x = \mu + A z` with the mean and the covariance
    :math:`A A^\top` of Laplace's approximation. The blocks are independent, so

    .. math::

        \log p(g) = \log p_{\text{Laplace}}(g)
        + \sum_b \log \int e^{h_b(z_b)}\, \varphi(z_b)\, dz_b,
        \qquad \sum_b h_b = \log p(x, g) - \log p(\mu, g) + \tfrac12 |z|^2.

    Of 17 nodes and more :math:`A z` becomes :math:`A\, t(z)`, so that they reach into heavy tails,
    see :class:`pyroflows.distributions.quadrature.HermiteNodes`.

    One gradient of the log joint density gives the slopes of all :math:`h_b` at once, and an
    integral along the axes their values: nothing needs to be known of the model's terms. A block is
    integrated along its elimination tree, on the :math:`k^d` points of a grid of Gauss-Hermite
    nodes if the tree has :math:`d` levels: one for single locals, two for pairs, and two for a
    school with any number of classes. The values of :math:`\sum_b h_b` on the grid come with the
    slopes, and what they tell of the error of interpolation is taken off. Where they tell that
    slopes are no guide to values, as far out where a block has a mode much narrower than the
    distance of nodes, the density is not known and counts as zero.

    Args:
        marginal: The marginal density by Laplace's approximation.
        count: Nodes along each axis; odd.
        steps: Newton steps from the reference.

    Attributes:
        error: The mean and standard deviation of the error of the log density, as
            :func:`integrate_leaves` estimates them from numbers of nodes; ``None`` if it did not.

    Reference:
        Liu, Pierce, "A note on Gauss-Hermite quadrature", 1994,
        https://doi.org/10.1093/biomet/81.3.624
    """

    def __init__(self, marginal: Marginal, count: int, steps: int = STEPS) -> None:
        self.marginal, self.steps = marginal, steps
        self.nodes = HermiteNodes(count, STRETCH if count >= MANY else 0.0)
        self.tree = marginal.tree
        self.error: tuple[float, float] | None = None

    @property
    def settled(self) -> bool:
        """Whether the nodes are known to suffice."""
        if self.error is None:
            return False
        mean, deviation = self.error
        return abs(mean) < MEAN and deviation < DEVIATION

    @property
    def usable(self) -> bool:
        """Whether the integrals are known to be near enough for weights."""
        return self.error is not None and max(map(abs, self.error)) < USABLE

    def condition(self, g: Tensor, reference: Tensor, steps: int | None = None) -> Conditional:
        """The locals given globals, by Laplace's approximation."""
        return self.marginal.condition(g, reference, steps)

    def evaluate(self, g: Tensor, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The log density of globals and the modes of the locals.

        Args:
            g: Globals of shape ``(n, features)``.
            reference: As in :meth:`log_prob`.

        Returns:
            Tensors of shape ``(n,)`` and ``(n, locals)``.
        """
        start = self.reference if reference is None else reference
        parts = list(self._integrate(g, start))
        means = [part.conditional.mean for part in parts]
        return torch.cat([part.log_marginal for part in parts]), torch.cat(means)

    def log_prob(self, g: Tensor, reference: Tensor) -> Tensor:
        """The log density of globals.

        Args:
            g: Globals of shape ``(n, features)``.
            reference: Where the locals start, of shape ``(locals,)`` or ``(n, locals)``.

        Returns:
            Tensor of shape ``(n,)``; ``-inf`` where the model fails.
        """
        return torch.cat([part.log_marginal for part in self._integrate(g, reference)]).to(g)

    def try_out(self, g: Tensor, reference: Tensor) -> tuple[Tensor, bool]:
        """The log density of globals, and whether it hangs on what was taken off the errors."""
        parts = list(self._integrate(g, reference))
        sizes = torch.cat([part.size for part in parts])
        rough = sizes.nanmedian() > ROUGH * len(self.marginal.structure.block_sizes)
        return torch.cat([part.log_marginal for part in parts]), bool(rough)

    def sample(
        self, g: Tensor, reference: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws the locals given globals.

        Args:
            g: Globals of shape ``(n, features)``.
            reference: As in :meth:`log_prob`.
            noise: Standard normal numbers of which the draws are made, of shape ``(n, locals)``, or
                ``(m, n, locals)`` for several draws a point; fresh ones if ``None``. More draws
                need no more evaluations of the model.

        Returns:
            The locals, of the shape of the noise, and the log density of the globals, of shape
            ``(n,)``.
        """
        if noise is None:
            noise = torch.randn(len(g), len(self.marginal.reference)).to(g).double()
        several = noise.reshape(-1, *noise.shape[-2:])
        draws, values, first = [], [], 0
        for part in self._integrate(g, reference, len(several)):
            last = first + len(part.log_marginal)
            draws.append(self._draw(part, several[:, first:last]))
            values.append(part.log_marginal)
            first = last
        return torch.cat(draws, 1).reshape(noise.shape).to(g), torch.cat(values).to(g)

    # Integrals

    @torch.no_grad()
    def _integrate(self, g: Tensor, reference: Tensor, draws: int = 0) -> Iterator[_Integrated]:
        """The integrals, a few points at a time."""
        locals_ = len(self.marginal.reference)
        per_local = self.nodes.count**self.tree.depth + draws * len(self.nodes.grid)
        size = max(1, NUMBERS_AT_ONCE // (per_local * locals_))
        g = g.double()
        start = reference.to(g).expand(len(g), locals_)
        for few, near in zip(g.split(size), start.split(size), strict=True):
            yield self._integrate_few(few, near)

    def _integrate_few(self, g: Tensor, reference: Tensor) -> _Integrated:
        conditional = self.marginal.condition(g, reference, self.steps)
        total, slopes = self._differentiate(g, conditional)
        heights = [self._integrate_slopes(slopes, depth) for depth in range(self.tree.depth)]
        error = (total - self._add(heights)).nan_to_num(0, 0, 0)
        errors = torch.stack([error, error.abs()], -1)
        weights = self.nodes.log_weights.to(g)[:, None, None]
        for depth in reversed(range(self.tree.depth)):
            weighted = heights[depth] + weights
            messages = torch.logsumexp(weighted, depth)
            shares = (weighted - messages.unsqueeze(depth)).exp()
            # Most of a great error is that of a block which is far from its mean.
            sizes = heights[depth].abs() + USUAL
            shares = (shares * sizes).sum(-1) / sizes.sum(-1)
            errors = (shares.unsqueeze(-1) * errors).sum(depth)
            if depth:
                parents = self.tree.parents[depth].to(g.device)
                heights[depth - 1].index_add_(-1, parents, messages)
        error, size = errors.unbind(-1)
        log_marginal = conditional.log_marginal + messages.sum(-1) + error
        known = size < max(WILD, WILD_EACH * len(self.marginal.structure.block_sizes))
        usable = log_marginal.isfinite() & known
        return _Integrated(conditional, log_marginal.where(usable, -torch.inf), heights, size)

    def _differentiate(self, g: Tensor, conditional: Conditional) -> tuple[Tensor, Tensor]:
        """The height of all blocks together at the points of the grid, less that at the mean, of
        shape ``(k, ..., k, n)``, and its slopes by the noise of the locals."""
        depth, count = self.tree.depth, self.nodes.count
        axes = torch.cartesian_prod(*depth * [torch.arange(count)]).reshape(-1, depth)
        z = self.nodes.points[axes[:, self.tree.depths]].to(g).unsqueeze(1)
        noise = self.nodes.spread(z).expand(-1, len(g), -1)
        x = conditional.mean + conditional.normal.draw_centred(noise)
        points = g.expand(len(x), -1, -1).flatten(0, 1)
        values, slopes = self.marginal.value_and_slopes(points, x.flatten(0, 1))
        # Where the model fails, far out, its density counts as flat, and nothing is corrected.
        slopes = slopes.reshape(x.shape).nan_to_num(0, 0, 0)
        log_rates, bends = self.nodes.log_rate(z)
        heights = values.reshape(x.shape[:-1]) + (z.square() / 2 + log_rates).sum(-1)
        shape = *depth * [count], len(g)
        slopes = conditional.normal.pull_back(slopes) * log_rates.exp() + z + bends
        return (heights - heights[len(x) // 2]).reshape(shape), slopes.reshape(*shape, -1)

    def _integrate_slopes(self, slopes: Tensor, depth: int) -> Tensor:
        """What locals of a depth add to the height, given their own noise and their ancestors'."""
        below = (self.tree.depth - depth - 1) * (self.nodes.middle,)
        own = slopes[(slice(None),) * (depth + 1) + below][..., self.tree.levels[depth]]
        return self.nodes.integrate(own.movedim(depth, 0)).movedim(0, depth)

    def _add(self, heights: list[Tensor]) -> Tensor:
        """The height of all blocks together by those of the locals, of shape ``(k, ..., k, n)``."""
        total = heights[0].sum(-1)
        for height in heights[1:]:
            total = total.unsqueeze(-2) + height.sum(-1)
        return total

    # Draws

    @torch.no_grad()
    def _draw(self, integrated: _Integrated, noise: Tensor) -> Tensor:
        """Draws, each local given its ancestors, by inverse distribution functions."""
        grid, finely = self.nodes.grid.to(noise), self.nodes.interpolation.to(noise)
        whitened = torch.zeros_like(noise)
        ancestors: list[Tensor] = []
        for depth, entries in enumerate(self.tree.levels):
            ancestors = [basis[:, :, self.tree.parents[depth]] for basis in ancestors]
            heights = integrated.heights[depth].clamp_min(LOWEST).unsqueeze(-3)
            for basis in ancestors:
                heights = torch.einsum("k...mni,mnik->...mni", heights, basis)
            log_density = (
                torch.tensordot(finely, heights, 1) - grid.square()[:, None, None, None] / 2
            )
            uniform = torch.special.ndtr(noise[..., entries])
            whitened[..., entries] = draw_on_grid(grid, log_density, uniform)
            ancestors.append(self.nodes.interpolate_at(whitened[..., entries]))
        usable = integrated.log_marginal.isfinite().unsqueeze(-1)
        draws = integrated.conditional.sample(self.nodes.spread(whitened))
        return draws.where(usable, self.marginal.reference.to(noise))


class _Integrated(NamedTuple):
    """The locals given globals, the log density of these, for each depth the log densities of the
    locals against normal noise, of shape ``(k, ..., k, n, locals)``, and the mean size of their
    error."""

    conditional: Conditional
    log_marginal: Tensor
    heights: list[Tensor]
    size: Tensor


def integrate_leaves(
    marginal: Marginal, g: Tensor, reference: Tensor, steps: int = STEPS
) -> Leaves:
    r"""Integrates small blocks of locals with as many nodes as the model needs.

    The numbers of nodes 3, 5, 7, 9, 17, 33 are tried in turn until the error of the log density is
    less than .01 on average, with a standard deviation of less than .02. The error is the change
    with the next number, whose own error counts as a quarter of it.

    Args:
        marginal: The marginal density by Laplace's approximation.
        g: Globals at which the numbers are compared, of shape ``(n, features)``; some 20 to 50
            draws of a normal approximation to their posterior.
        reference: Where the locals start, of shape ``(locals,)`` or ``(n, locals)``.
        steps: Newton steps from the reference.

    Returns:
        The density; not :attr:`Leaves.settled` if no number of nodes is known to suffice.

    Raises:
        ValueError: If the blocks are too deep.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows.model import LogDensity
        >>> from pyroflows.model.structure import find_structure
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("groups", 5):
        ...         effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Bernoulli(logits=effect), obs=y)
        >>> density = LogDensity(model, (torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]),))
        >>> marginal = Marginal(density, find_structure(density))
        >>> leaves = integrate_leaves(marginal, torch.randn(20, 1).double(), marginal.reference)
        >>> leaves.settled, leaves.nodes.count
        (True, 5)
    """
    depth = marginal.tree.depth
    if not leaves_are_small(marginal):
        raise ValueError(f"Expected blocks of 1 to {DEEPEST} levels of locals; got {depth}.")
    counts = [count for count in COUNTS if count**depth <= MOST_POINTS]
    leaves = Leaves(marginal, counts[0], steps)
    values, rough = leaves.try_out(g, reference)
    for count in counts[1:]:
        more = Leaves(marginal, count, steps)
        finer, rougher = more.try_out(g, reference)
        mean, deviation = _mean_and_deviation(finer - values)
        leaves.error = mean, deviation
        if not math.isfinite(mean):
            return leaves
        if leaves.settled and leaves.nodes.count >= LEAST and not rough:
            return leaves
        more.error = SHARE * mean, SHARE * deviation
        if more.settled and not rougher:
            return more
        leaves, values, rough = more, finer, rougher
    return leaves


def leaves_are_small(marginal: Marginal) -> bool:
    """Whether the blocks of a model's locals are so small that they can be integrated.

    Args:
        marginal: The marginal density of the globals.

    Returns:
        Whether there are locals, and no block has more than four levels of them.
    """
    return 0 < marginal.tree.depth <= DEEPEST


def _mean_and_deviation(change: Tensor) -> tuple[float, float]:
    """The mean and standard deviation of what is finite, if that is the larger part."""
    finite = change[change.isfinite()]
    if len(finite) < max(2, len(change) / 2):
        return math.inf, math.inf
    return float(finite.mean()), float(finite.std())
