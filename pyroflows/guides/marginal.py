"""The globals of a model with its locals integrated out, by steps of Newton's method."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_size, check_tensor
from .._sharing import in_shares
from ..distributions.elimination import Elimination
from ..distributions.elimination_tree import EliminationTree, find_elimination_tree
from ..distributions.sparse_normal import SparseNormal
from ..model import LogDensity
from ..model.colouring import Colouring
from ..model.curvature import differentiate, multiply_hessian, points_at_once, slice_rows
from ..model.double import DoubleDensity
from ..model.rows import RowHessian, find_row_hessian
from ..model.structure import Structure

__all__ = ["Conditional", "Marginal"]

# Points for which there is a graph of their own, because one of many takes no fewer.
FEW = 8
# From so many products on, fewer are looked for.
MANY_COLOURS = 6
# Steps for locals that are not normal; they have settled when a step gains no more.
SEVERAL, SETTLED = 8, 1e-8
# Precisions of which the values differ by no more, relative to their sizes, are the same; by no
# more than the second, they do not even come of a model that rounds.
SAME, EXACTLY = 1e-6, 1e-10
# Means from two places that are so many standard deviations apart are not the same.
APART = 1e-3
# A step that is to raise the log density by more leaves too few digits of it.
HIGHEST = 1e6
# How often a step is halved before it is given up.
HALVINGS = 8


class Conditional(NamedTuple):
    """The locals given some values of the globals.

    Attributes:
        log_marginal: The log density of the globals, of shape ``(n,)``; ``-inf`` where the model
            fails.
        mean: The mean of the locals, of shape ``(n, locals)``.
        normal: Their normal distribution about that mean.
        gain: By how much the last step was to raise the log density, of shape ``(n,)``: unless the
            locals are normal, it is large where they are not at their mode.
    """

    log_marginal: Tensor
    mean: Tensor
    normal: SparseNormal
    gain: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Draws of the locals, of shape ``(n, locals)``, made of standard normal noise."""
        return self.mean + self.normal.draw_centred(noise)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log density at locals of shape ``(n, locals)``."""
        return self.normal.log_prob(x, self.mean)


class Derivatives(NamedTuple):
    """The log joint density, its gradient by the locals, and the values of their precision."""

    value: Tensor
    slope: Tensor
    precision: Tensor


class Marginal:
    r"""The log density of a model's globals, with the locals integrated out.

    At globals :math:`g` and a reference :math:`x_0` of the locals, a Newton step goes to

    .. math:: x_1 = x_0 + H^{-1} \nabla_x \log p(x_0, g), \quad H = -\nabla_x^2 \log p(x_0, g),

    the mean of the locals given :math:`g`, whose precision is :math:`H`, and

    .. math::

        \log p(g) = \log p(x_1, g) - \tfrac12 \log\det H + \tfrac n2 \log 2\pi.

    If the locals are normal given the globals, one step from anywhere is exact; else several steps
    give Laplace's approximation. The cost is linear in the number of locals: :math:`H` is read from
    its products with few vectors, and has a sparse factor. Locals are in the coordinates of the
    structure, in which a chain that is written by its increments has its states. Of crossed factors
    :math:`H` is read by the rows of data, see :class:`pyroflows.model.rows.RowHessian`.

    Args:
        density: A log density whose data do not come from a loader.
        structure: Its structure, by :func:`pyroflows.model.structure.find_structure`.

    Attributes:
        features: How many globals there are.
        initial: The globals at the start of the density, of shape ``(features,)``.
        reference: The locals there, in double precision.
        elimination: The order in which the locals are eliminated.
        steps: The most steps for locals that are not normal.

    Raises:
        ValueError: If more than 2,048 locals have to be treated as a dense matrix.

    Reference:
        Rue, Martino, Chopin, "Approximate Bayesian inference for latent Gaussian models by using
        integrated nested Laplace approximations", 2009,
        https://doi.org/10.1111/j.1467-9868.2008.00700.x

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows.model.structure import find_structure
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("groups", 5):
        ...         effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=y)
        >>> density = LogDensity(model, (torch.zeros(5),))
        >>> marginal = Marginal(density, find_structure(density))
        >>> at_zero = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
        >>> exact = at_zero + 5 * dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.0))
        >>> torch.isclose(marginal.log_prob(torch.zeros(1).double()), exact.double())
        tensor(True)
    """

    def __init__(self, density: LogDensity, structure: Structure) -> None:
        few, many = points_at_once(density, FEW)
        self.density = slice_rows(density, single=True) or DoubleDensity(density, many)
        self._of_few = slice_rows(density, FEW) or DoubleDensity(density, few)
        self.structure, self.steps = structure, SEVERAL
        self.features = len(structure.globals)
        initial = structure.coordinates.to_sums(density.initial.double())
        self.initial = density.initial[structure.globals]
        self.reference = initial[structure.locals]
        locals_ = len(structure.locals)
        self.elimination = Elimination(locals_, structure.local_edges)
        self._colouring = Colouring(locals_, structure.local_edges)
        self._directions = torch.zeros(self._colouring.count, density.features).double()
        self._directions[:, structure.locals] = self._colouring.directions
        outside = (self._directions == 0).all(0).split([site.features for site in density.sites])
        pairs = zip(density.sites, outside, strict=True)
        self._held = {site.name for site, entries in pairs if entries.all()}
        self._rows = self._find_rows()

    def _find_rows(self) -> RowHessian | None:
        """What reads precisions with fewer products, if there is much to save."""
        structure = self.structure
        if self._colouring.count < MANY_COLOURS or structure.coordinates.chains:
            return None
        edges = structure.local_edges
        rows = find_row_hessian(self._of_few, structure.locals, edges, self._held)
        return rows if rows is not None and 2 * rows.count < self._colouring.count else None

    @functools.cached_property
    def tree(self) -> EliminationTree:
        """Which locals depend on the noise of which."""
        return find_elimination_tree(self.elimination)

    @property
    def is_normal(self) -> bool:
        """Whether the locals are normal given the globals: their precision is the same wherever it
        is taken."""
        return self._bend < SAME

    @functools.cached_property
    def _bend(self) -> float:
        """By how much the precision of the locals differs between two places, relative to its
        size."""
        if not len(self.reference):
            return 0.0
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(self.reference), generator=generator).to(self.reference)
        # To both sides, because a kink lies between; not as far, because curvatures are symmetric.
        x = self.reference + torch.stack([noise, -2 * noise])
        g = self.initial.double().expand(2, -1)
        found = self.differentiate(g, x)
        one, other = found.precision
        sizes = one.abs() + one.abs().mean()
        bend = float(((one - other).abs() / sizes).amax().nan_to_num(torch.inf))
        # Second derivatives say nothing of a kink, but means do.
        normal = SparseNormal(self.elimination, found.precision, repaired=True)
        means = x + normal.solve(found.slope)
        apart = float(normal.whiten(means - means.flip(0)).abs().amax().nan_to_num(torch.inf))
        return bend if apart < APART else torch.inf

    def log_prob(
        self, g: Tensor, reference: Tensor | None = None, steps: int | None = None
    ) -> Tensor:
        """The log density of globals.

        Args:
            g: Globals of shape ``(*, features)``.
            reference: Where the locals start, of shape ``(locals,)`` or ``(*, locals)``;
                :attr:`reference` if ``None``.
            steps: As in :meth:`condition`.

        Returns:
            Tensor of shape ``(*)``; ``-inf`` where the model fails.
        """
        return self.evaluate(g, reference, steps)[0]

    @torch.no_grad()
    def evaluate(
        self, g: Tensor, reference: Tensor | None = None, steps: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The log density of globals and the means of the locals, a few points at a time.

        Args:
            g: Globals of shape ``(*, features)``.
            reference: As in :meth:`log_prob`.
            steps: As in :meth:`condition`.

        Returns:
            Tensors of shape ``(*)`` and ``(*, locals)``.
        """
        check_tensor("g", g, (self.features,))
        start = self.reference if reference is None else reference
        points = g.reshape(math.prod(g.shape[:-1]), self.features)
        start = start.expand(*g.shape[:-1], -1).reshape(len(points), start.shape[-1])
        given = torch.cat([points, start.to(points)], -1)
        evaluate = functools.partial(self._evaluate, steps=steps)
        values, means = (part.to(g) for part in in_shares(evaluate, given, 1 + start.shape[-1]))
        return values.reshape(g.shape[:-1]), means.reshape(*g.shape[:-1], means.shape[-1])

    def _evaluate(self, given: Tensor, steps: int | None) -> tuple[Tensor, Tensor]:
        parts = []
        for few in given.split(self.density.batch_size):
            g, start = few.split([self.features, few.shape[-1] - self.features], -1)
            parts.append(self.condition(g, start, steps)[:2])
        values, means = map(torch.cat, zip(*parts, strict=True))
        return values, means

    @torch.no_grad()
    def condition(self, g: Tensor, reference: Tensor, steps: int | None = None) -> Conditional:
        """The locals given globals.

        Args:
            g: Globals of shape ``(n, features)``.
            reference: Where the locals start, of shape ``(n, locals)``.
            steps: Steps of Newton's method; if ``None``, one for normal locals and :attr:`steps`
                for others, or fewer if they settle. They are halved as long as they lower the density,
                and the last is left out then. Where the density is not concave, precisions are
                repaired.

        Returns:
            Their normal distributions, in double precision.
        """
        g, x = g.double(), reference.double()
        if not len(self.reference):
            nothing = g.new_zeros(len(g), 0)
            normal = SparseNormal(self.elimination, nothing)
            return _conditional(self.log_joint(g, nothing), nothing, normal, g.new_zeros(len(g)))
        if steps is None:
            steps = 1 if self.is_normal else self.steps
        for _ in range(check_size("steps", steps) - 1):
            x, gain = self._improve(g, x)
            if gain < SETTLED:
                break
        return self._step(g, x)

    def _step(self, g: Tensor, x: Tensor) -> Conditional:
        """The locals after a step of Newton's method, which is left out where it lowers the
        density."""
        before, slope, precision = self.differentiate(g, x)
        normal = SparseNormal(self.elimination, precision, repaired=True)
        step = normal.solve(slope)
        gain = (slope * step).sum(-1) / 2
        # A parabola needs no value at its top, unless a long way up takes the digits of it.
        if self._bend < EXACTLY and gain.abs().amax() < HIGHEST:
            return _conditional(before + gain, x + step, normal, gain)
        value = self.log_joint(g, x + step)
        lower = value < self._least(before)
        mean = torch.where(lower.unsqueeze(-1), x, x + step)
        return _conditional(torch.where(lower, before, value), mean, normal, gain)

    def with_steps(self, steps: int) -> Marginal:
        """The same with at most so many steps for locals that are not normal."""
        other = copy.copy(self)
        other.steps = steps
        return other

    @torch.no_grad()
    def precision(self, g: Tensor, x: Tensor) -> Tensor:
        """The entries of the precision of the locals, of shape ``(n, entries)``, at globals of
        shape ``(n, features)`` and locals of shape ``(n, locals)``."""
        size = self.density.batch_size
        pairs = zip(g.split(size), x.split(size), strict=True)
        return torch.cat([self.differentiate(few, near).precision for few, near in pairs])

    def __deepcopy__(self, memo: dict[int, Any]) -> Marginal:
        return self  # it does not change

    def join(self, g: Tensor, x: Tensor) -> Tensor:
        """The unconstrained vectors of globals and locals, of shape ``(n, density.features)``."""
        w = g.new_empty(len(g), self.density.features)
        w[:, self.structure.globals], w[:, self.structure.locals] = g, x
        return self.structure.coordinates.from_sums(w)

    def value_and_slopes(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The log joint density and its gradients by the locals, a few points at a time.

        Args:
            g: Globals of shape ``(n, features)``.
            x: Locals of shape ``(n, locals)``.

        Returns:
            Tensors of shape ``(n,)`` and ``(n, locals)``; not finite where the model fails.
        """
        size = self.density.batch_size
        pairs = zip(g.split(size), x.split(size), strict=True)
        parts = [self._value_and_slopes(few, near) for few, near in pairs]
        values, slopes = map(torch.cat, zip(*parts, strict=True))
        return values, slopes

    def _value_and_slopes(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        density = self._of_so_many(len(g))
        values, gradients = differentiate(density, self.join(g, x), self._held)
        return values, self.structure.coordinates.pull_back(gradients)[:, self.structure.locals]

    def differentiate(self, g: Tensor, x: Tensor) -> Derivatives:
        """The log joint density, its gradient by the locals, and the values of their precision.

        Args:
            g: Globals of shape ``(n, features)``.
            x: Locals of shape ``(n, locals)``.
        """
        inner, sums = self.structure.locals, self.structure.coordinates
        density, points = self._of_so_many(len(g)), self.join(g, x)
        if self._rows is not None:
            read = self._rows.read(density, points)
            return Derivatives(read.values, read.gradients[:, inner], -read.entries)
        directions = sums.from_sums(self._directions)
        found = multiply_hessian(density, points, directions, self._held)
        slope = sums.pull_back(found.gradients)[:, inner]
        products = sums.pull_back(found.products)[..., inner]
        return Derivatives(found.values, slope, -self._colouring.read(products))

    def _improve(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """A step that does not lower the log density, and the most that it promises to gain."""
        values, slope, precision = self.differentiate(g, x)
        normal = SparseNormal(self.elimination, precision, repaired=True)
        step = normal.solve(slope)
        gain = (slope * step).sum(-1).nan_to_num(0).amax() / 2
        least = self._least(values)
        length = torch.ones_like(values)
        for _ in range(HALVINGS):
            moved = x + length.unsqueeze(-1) * step
            good = self.log_joint(g, moved) >= least
            if good.all():
                return moved, gain
            length = length.where(good, length / 2)
        return moved.where(good.unsqueeze(-1), x), gain

    def log_joint(self, g: Tensor, x: Tensor) -> Tensor:
        """The log density of globals and locals, of shape ``(n,)``, in double precision."""
        return self._of_so_many(len(g)).log_joint(self.join(g, x))

    def _least(self, values: Tensor) -> Tensor:
        """The values from which others are told in spite of rounding."""
        return values - torch.finfo(values.dtype).eps ** 0.6 * values.abs() - self.density.rounding

    def _of_so_many(self, points: int) -> DoubleDensity:
        """The density that wastes least on so many points."""
        return self._of_few if points <= self._of_few.batch_size else self.density


def _conditional(value: Tensor, mean: Tensor, normal: SparseNormal, gain: Tensor) -> Conditional:
    """The locals given globals, where the log joint density at their mean is known."""
    log_marginal = value - 0.5 * normal.log_det + 0.5 * normal.size * math.log(2 * math.pi)
    usable = log_marginal.isfinite()
    return Conditional(log_marginal.where(usable, -torch.inf), mean, normal, gain)
