"""A guide that follows the structure of a model: a flow for its globals, normals for its locals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from .._checks import check_batch_shape
from .._random import forked
from .._spec import build, describe
from ..distributions.sparse_normal import SparseNormal
from ..flows import Flow, RealNVP
from ..model.density import LogDensity
from ..model.start import init_to_median
from ..model.structure import Structure, find_structure
from ..nn import mlp
from ..transforms import Elementwise, Transform
from ..univariate import SumOfSquares
from .auto import FlowGuide
from .core import CoreProposal, SampledCore, has_core, make_core
from .guide import Part
from .leaves import LEAST, Leaves, integrate_leaves, leaves_are_small
from .marginal import Conditional, Marginal
from .marginal_mode import MarginalMode
from .regressed_leaves import RegressedLeaves, regress_leaves
from .regressed_locals import NormalLocals, RegressedLocals, regress_precision
from .warm_reference import WarmReference, regress_reference, regress_shift

__all__ = ["AutoStructuredFlow"]

TRANSFORMS, WIDTH = 4, 32
# Draws of the globals at which numbers of nodes are compared.
COMPARED = 50
# Draws of the locals by which the noise of their weights is found, the variance that is to be left
# of it, relative to the square of the weight, and the most draws for one of the globals.
PILOTS, NOISE, MOST_REPEATS, LARGEST_NOISE = 4, 0.25, 32, 10.0
# Draws at which regressed locals are compared with those by so many steps, and the standard
# deviations that may be left: of the log density of the globals, and of the weights.
FEW_COMPARED, LAPLACE_STEPS, REGRESSED_ERROR, REGRESSED_NOISE = 16, 2, 0.02, 0.2


class AutoStructuredFlow(FlowGuide):
    r"""A flow over the globals of a model, and the normal distribution of its locals given them.

    .. math:: q(g, x) = q_\phi(g)\; \mathcal N\bigl(x \mid m(g),\, H(g)^{-1}\bigr)

    Globals :math:`g` are the few entries on which all others depend, such as the mean and the scale
    of groups; locals :math:`x` are all others. Which is which, and which locals touch which, is
    found from the second derivatives of the log density. The mean and the precision of the locals
    are those of a step of Newton's method at the globals: exact if the locals are normal given
    them, whatever the globals' distribution, and else Laplace's approximation, which
    :meth:`integrate_leaves` corrects. Nothing about the locals is trained, and time and memory are
    linear in their number.

    In an SVI the flow is trained. The gradient runs through the globals alone, at fixed locals,

    .. math:: \nabla_g \log p(g, \mathrm{data})
        = \mathbb{E}_{p(x \mid g, \mathrm{data})} [\nabla_g \log p(g, x, \mathrm{data})],

    which is Fisher's identity. :func:`pyroflows.fit_posterior` needs far fewer evaluations.

    Args:
        model: A Pyro model.
        flow: Makes the flow of the globals; as in :class:`AutoFlow`. By default a small
            ``RealNVP``.
        init_loc_fn: Where each site starts.
        init_scale: Standard deviation of the globals at the start, in unconstrained units.

    Raises:
        ValueError: In the first call, if the model has no globals or no locals, if the locals have
            no sparse structure, or as in :class:`AutoFlow`.

    Reference:
        Rue, Martino, Chopin, "Approximate Bayesian inference for latent Gaussian models by using
        integrated nested Laplace approximations", 2009,
        https://doi.org/10.1111/j.1467-9868.2008.00700.x

        Ko, Domke, "Model-informed flows for Bayesian inference", 2025,
        https://arxiv.org/abs/2505.24243

    Example:
        >>> import pyro, pyroflows as pf
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("groups", len(y)):
        ...         effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=y)
        >>> guide = AutoStructuredFlow(model)
        >>> _ = guide(torch.zeros(5))
        >>> guide.features, guide.marginal.features, len(guide.parts())
        (6, 1, 2)
    """

    has_marginal = True

    def __init__(
        self,
        model: Callable[..., Any],
        flow: Callable[[int], Flow | Transform] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        super().__init__(model, flow or make_small_flow, init_loc_fn, init_scale)
        # In a tuple, because a model that is a module is no part of the guide.
        self._given = (model, init_loc_fn)
        self._marginal: Marginal | None = None
        self._leaves: Leaves | SampledCore | None = None
        self.core: CoreProposal | None = None
        self._regressed: RegressedLeaves | None = None

    @classmethod
    def of(
        cls,
        density: LogDensity,
        structure: Structure | None = None,
        flow: Callable[[int], Any] | None = None,
    ) -> AutoStructuredFlow:
        """Makes the guide of a model whose log density is known.

        Args:
            density: The log density.
            structure: Its structure; found if ``None``.
            flow: As in the constructor.
        """
        guide = cls(density.continuous_model, flow, density.init_loc_fn)
        guide._marginal = Marginal(density, structure or find_structure(density))
        density.introduce(guide)
        return guide

    def _build(self, *args: Any, **kwargs: Any) -> None:
        super()._build(*args, **kwargs)
        if self._marginal is None:
            model, init_loc_fn = self._given
            density = LogDensity(model, args, kwargs, init_loc_fn)
            self.rotate(density.centres)
            self._marginal = Marginal(density, find_structure(density))
        if not self._marginal.features:
            raise ValueError(
                "Expected a model with globals, which are a few entries on which many others "
                f"depend; got none among {self.features} latent entries."
            )
        self.flow = self._whitened_flow(self._marginal.initial)
        reference, features = self._marginal.reference, self._marginal.features
        self.register_buffer("reference", reference.clone())
        self.register_buffer("slopes", reference.new_zeros(features, len(reference)))
        self.register_buffer("shift", torch.zeros_like(reference))
        self.register_buffer("shift_slopes", torch.zeros_like(self.slopes))
        self.register_buffer("centre", self._marginal.initial.double())
        self.register_buffer("root", torch.eye(features).to(reference))
        entries = len(reference) + len(self._marginal.structure.local_edges)
        self.register_buffer("precisions", reference.new_zeros(1 + features, entries))
        self.register_buffer("nodes", torch.zeros((), dtype=torch.long))
        self.register_buffer("repeats", torch.ones((), dtype=torch.long))
        if has_core(self._marginal):
            self.core = make_core(self._marginal).to(reference.device)

    # The parts

    @property
    def marginal(self) -> Marginal:
        """The log density of the globals, with the locals integrated out."""
        self._check_built("marginal")
        if self._marginal is None:
            raise RuntimeError(
                "Expected a guide with a model; got one that was pickled, and pickles hold no "
                "model. Make a new AutoStructuredFlow(model), and load its state_dict."
            )
        return self._marginal

    @property
    def leaves(self) -> Leaves | SampledCore | None:
        """The same, with small blocks of locals integrated by quadrature, and a core drawn that
        joins them; ``None`` before :meth:`integrate_leaves`."""
        count = int(self.nodes)
        if not count:
            return None
        if self._leaves is None or self._leaves.nodes.count != count:
            self._leaves = self._make_leaves(count)
        return self._leaves

    def _make_leaves(self, count: int) -> Leaves | SampledCore:
        if self.core is None:
            return Leaves(self.marginal, count)
        return SampledCore(self.marginal, self.core, count)

    @property
    def weighs_globals_alone(self) -> bool:
        """Whether the weights of draws are weights of their globals, because the locals given them
        are exact."""
        return self.marginal.is_normal or self.leaves is not None

    def start_at(self, mode: MarginalMode) -> None:
        """Starts the flow at the normal approximation of the globals at the mode of their density.

        Args:
            mode: The mode.
        """
        loc, marginal = self._init_loc(), self.marginal
        self.flow.whiten(mode.loc.to(loc), mode.root.to(loc))
        self.reference.copy_(mode.reference)
        self.precisions.zero_()
        if not marginal.is_normal and mode.found:
            integrated = self._leaves if isinstance(self._leaves, SampledCore) else marginal
            warm = regress_reference(integrated, mode.loc, mode.root, mode.reference)
            self.centre.copy_(warm.loc)
            self.root.copy_(warm.root)
            self.reference.copy_(warm.constant)
            self.slopes.copy_(warm.slopes)
        if isinstance(self._leaves, SampledCore):
            self._leaves.fit(mode, self._warm)

    def integrate_leaves(self) -> Leaves | SampledCore | None:
        """Integrates the locals by quadrature from now on, if they are not normal given the globals
        and come in small independent blocks, or do so given a few of them.

        The numbers of nodes are compared at draws of the flow.

        Returns:
            The log density of the globals, or ``None`` if that cannot be done, need not be, or if no
            number of nodes suffices.
        """
        marginal = self.marginal
        if marginal.is_normal or not (self.core or leaves_are_small(marginal)):
            return None
        g = self._pilot_draws()
        leaves = self._make_leaves(LEAST)
        if isinstance(leaves, SampledCore):
            leaves.choose_nodes(g, self.near(g))
            leaves.start(g[:1], self.near(g[:1]))
        else:
            leaves = integrate_leaves(marginal, g, self.near(g))
        if not leaves.usable:
            return None  # weights of the locals tell how far they are off
        self._leaves = leaves
        self.nodes.fill_(leaves.nodes.count)
        return leaves

    def regress_leaves(self) -> RegressedLeaves | None:
        """Regresses the error of few nodes on the globals around the present start, so that
        integrals cost less from now on.

        Returns:
            The log density of the globals, or ``None`` if that is not exact enough.
        """
        if not isinstance(self.leaves, Leaves):
            return None
        # A copy, because the polynomial keeps its units when the guide starts elsewhere.
        regressed = regress_leaves(self.leaves, copy.deepcopy(self._warm))
        self._regressed = regressed if regressed.settled else None
        return self._regressed

    @property
    def regressed_locals(self) -> RegressedLocals | None:
        """The locals by regression; ``None`` before :meth:`regress_locals`."""
        if not bool(self.precisions.any()):
            return None
        return RegressedLocals(self.marginal, self._warm, self.precisions)

    @torch.no_grad()
    def regress_locals(self) -> RegressedLocals | None:
        """Regresses mean and precision of the locals on the globals around the present start, so
        that draws and values cost least from now on.

        Returns:
            The locals; ``None`` if they are not so nearly normal, or not so regular.
        """
        marginal = self.marginal
        regressed = RegressedLocals(marginal, self._warm, regress_precision(marginal, self._warm))
        g = self._pilot_draws()
        values = regressed.log_prob(g)
        few = g[:FEW_COMPARED]
        error = (values[: len(few)] - marginal.log_prob(few, self.near(few), LAPLACE_STEPS)).std()
        self.precisions.copy_(regressed.precisions)
        with forked(0):
            scores = [self._draw_several(some, 1)[1].squeeze(0) for some in self._chunks(g)]
        noise = (torch.cat(scores) - values).std()
        if bool((error < REGRESSED_ERROR) & (noise < REGRESSED_NOISE)):
            self.nodes.zero_()
            self.repeats.fill_(1)
            return regressed
        self.precisions.zero_()
        return None

    def repeat_locals(self) -> None:
        """Draws locals that are not exact about their mean instead of their mode from now on, if
        that takes noise from their weights, and several times for each draw of the globals, as
        often as the noise that is left demands."""
        if self.weighs_globals_alone:
            return
        about_mode = self._find_noise()
        shift = regress_shift(self.marginal, self._warm)
        self.shift.copy_(shift.constant)
        self.shift_slopes.copy_(shift.slopes)
        noise = self._find_noise()
        if not noise < about_mode:
            self.shift.zero_()
            self.shift_slopes.zero_()
            noise = about_mode
        wanted = (math.exp(min(noise, LARGEST_NOISE)) - 1) / NOISE
        self.repeats.fill_(max(1, min(MOST_REPEATS, math.ceil(wanted))))

    @torch.no_grad()
    def _find_noise(self) -> float:
        """The variance of the log weights of locals, given draws of the globals."""
        g = self._pilot_draws()
        with forked(0):
            scores = [self._draw_several(few, PILOTS)[1] for few in self._chunks(g)]
        return float(torch.cat(scores, -1).var(0).nanmedian().nan_to_num(torch.inf))

    def _pilot_draws(self) -> Tensor:
        """Draws of the globals, the same each time."""
        with torch.no_grad(), forked(0):
            return self.flow().sample((COMPARED,)).double()

    @property
    def _warm(self) -> WarmReference:
        return WarmReference(self.centre, self.root, self.reference, self.slopes)

    @property
    def _shift(self) -> WarmReference:
        """From the mode of the locals to the mean about which they are drawn."""
        return WarmReference(self.centre, self.root, self.shift, self.shift_slopes)

    def near(self, g: Tensor) -> Tensor:
        """Where Newton's method begins for the locals.

        Args:
            g: Globals of shape ``(n, globals)``.

        Returns:
            Tensor of shape ``(n, locals)``.
        """
        return self.reference.expand(len(g), -1) if self.marginal.is_normal else self._warm(g)

    def log_marginal(self, g: Tensor) -> Tensor:
        """The log density of globals of shape ``(*, globals)``, with the locals integrated out."""
        points = g.reshape(-1, g.shape[-1]).double()
        if not len(points):
            return points.new_zeros(g.shape[:-1])
        integrated = self._regressed or self.leaves
        if self.regressed_locals is not None:
            values = self.regressed_locals.log_prob(points)
        elif integrated is not None:
            values = integrated.log_prob(points, self.near(points))
        else:
            # By chunks, because a value takes the locals' mean with it.
            values = torch.cat(
                [self.marginal.log_prob(few, self.near(few)) for few in self._chunks(points)]
            )
        return values.reshape(g.shape[:-1])

    def parts(self, rows: Tensor | None = None) -> Sequence[Part]:
        """The globals, and the locals given them; see :meth:`Guide.parts`."""
        globals_, n = self.marginal.structure.globals, len(self.marginal.structure.globals)
        locals_ = self.marginal.structure.locals

        def draw_locals(count: int, before: Tensor) -> tuple[Tensor, Tensor]:
            z, log_prob = self._complete(before[:, :n])
            return z[:, locals_], log_prob

        return (
            Part(
                globals_,
                None,
                lambda count, before: self.flow().rsample_and_log_prob((count,)),
                lambda z: self.flow().log_prob(z[:, globals_]),
            ),
            Part(locals_, None, draw_locals, self._local_log_prob),
        )

    # The contract of a guide

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws vectors and scores them; see :meth:`Guide.sample_and_log_prob`."""
        g, log_prob = self.flow().rsample_and_log_prob((n,))
        z, local_log_prob = self._complete(g)
        return z, log_prob + local_log_prob

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores vectors; see :meth:`Guide.log_prob`."""
        g = z[..., self.marginal.structure.globals]
        return self.flow().log_prob(g) + self._local_log_prob(z)

    def sample(self, n: int) -> Tensor:
        """Draws vectors, whose locals are exact where they are integrated; see
        :meth:`Guide.sample`."""
        if self.leaves is None and int(self.repeats) == 1:
            with torch.no_grad():
                return self.sample_and_log_prob(n)[0]
        return self.sample_and_weigh(self.marginal.density, n)[0]

    @torch.no_grad()
    def sample_and_weigh(self, density: LogDensity, n: int) -> tuple[Tensor, Tensor]:
        """Draws vectors and weighs them; see :meth:`Guide.sample_and_weigh`.

        Locals that are integrated are drawn from their distribution given the globals, and the
        weights are those of the globals. Sums over many rows keep their digits, because all but the
        flow is in double precision.
        """
        g, log_q = self.flow().rsample_and_log_prob((n,))
        pairs = [self._draw_and_score(few.double()) for few in self._chunks(g)]
        draws, log_weights = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return draws.to(g), log_weights - log_q.double()

    def _draw_and_score(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors whose locals are drawn given globals, and the log of the density of the vectors
        over that of the locals."""
        if self.leaves is not None:
            x, log_marginal = self.leaves.sample(g, self.near(g))
            return self.marginal.join(g, x), log_marginal
        x, scores = self._draw_several(g, int(self.repeats))
        # One of several draws, chosen by their weights, has the mean of the weights.
        gumbel = -torch.rand_like(scores).log().neg().log()
        chosen = (scores + gumbel).argmax(0)
        picked = x[chosen, torch.arange(len(g), device=g.device)]
        return self.marginal.join(g, picked), scores.logsumexp(0) - math.log(len(x))

    def _draw_several(self, g: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Several draws of the locals given globals, of shape ``(count, n, locals)``, and the logs
        of the densities of the vectors over those of the locals, of shape ``(count, n)``."""
        given = self._condition(g)
        x = given.sample(torch.randn(count, *given.mean.shape).to(given.mean))
        log_joint = torch.stack([self.marginal.log_joint(g, each) for each in x])
        return x, log_joint - given.log_prob(x)

    def _complete(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors whose locals are drawn given globals of shape ``(n, globals)``, and the log
        density of these."""
        blocks, log_probs = [], []
        for few in self._chunks(g):
            x, log_prob = self._draw(few)
            blocks.append(self._with_graph(few, self.marginal.join(few.double(), x)))
            log_probs.append(log_prob.to(g))
        return torch.cat(blocks), torch.cat(log_probs)

    def _with_graph(self, g: Tensor, z: Tensor) -> Tensor:
        """The vectors, of which the globals carry the graph of the given ones."""
        return z.to(g).index_copy(-1, self.marginal.structure.globals, g)

    @torch.no_grad()
    def _draw(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Draws of the locals given globals, and the log density of these."""
        given = self._condition(g)
        x = given.sample(torch.randn_like(given.mean))
        return x, given.log_prob(x)

    def _condition(self, g: Tensor) -> Conditional | NormalLocals:
        g = g.detach().double()
        if not len(self.reference):
            nothing = g.new_zeros(len(g), 0)
            return NormalLocals(nothing, SparseNormal(self.marginal.elimination, nothing))
        if self.regressed_locals is not None:
            return self.regressed_locals.condition(g)
        given = self.marginal.condition(g, self.near(g))
        if self.weighs_globals_alone:
            return given
        return given._replace(mean=given.mean + self._shift(g))

    @torch.no_grad()
    def _local_log_prob(self, z: Tensor) -> Tensor:
        structure, points = self.marginal.structure, z.detach().reshape(-1, z.shape[-1])
        found = []
        for few in self._chunks(points):
            x = structure.coordinates.to_sums(few.double())[:, structure.locals]
            found.append(self._condition(few[:, structure.globals]).log_prob(x))
        return torch.cat(found).to(z).reshape(z.shape[:-1])

    def _chunks(self, values: Tensor) -> Iterator[Tensor]:
        return iter(values.split(self.marginal.density.batch_size))

    def _parts_spec(self) -> dict[str, Any]:
        return {"flow": describe(self.flow)["kwargs"]["flow"]}

    @classmethod
    def make(cls, spec: Mapping[str, Any], density: LogDensity) -> AutoStructuredFlow:
        """Makes the guide of a spec."""
        return cls.of(density, flow=lambda features: build(spec["flow"]))

    # Copying

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_marginal": None,
            "_leaves": None,
            "_regressed": None,
            "_given": None,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoStructuredFlow:
        new: Any = super().__deepcopy__(memo)
        new._marginal, new._given = self._marginal, self._given
        new._leaves, new._regressed = self._leaves, self._regressed
        return new

    # The protocol of AutoContinuous

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Raises an error, because no one map leads from a base to all latents.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Expected a guide with one map from a base to all latents; got an AutoStructuredFlow, "
            "which draws locals given globals. For NeuTraReparam fit with guide=pyroflows.RealNVP."
        )

    def get_posterior(self, *args: Any, **kwargs: Any) -> StructuredDistribution:
        """The distribution of the unconstrained latent vector."""
        self._check_built("get_posterior")
        return StructuredDistribution(self)


class StructuredDistribution(dist.TorchDistribution):
    """The distribution of the vectors of a structured guide.

    Args:
        guide: The guide.
        batch_shape: How many independent vectors a draw has.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, guide: AutoStructuredFlow, batch_shape: Any = ()) -> None:
        self.guide = guide
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(torch.Size(batch_shape), torch.Size([guide.features]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StructuredDistribution:
        """The distribution of several vectors."""
        return StructuredDistribution(self.guide, batch_shape)

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draws vectors of shape ``(*sample_shape, *batch_shape, features)``, whose globals carry a
        graph, and scores them."""
        shape = check_batch_shape("sample_shape", sample_shape) + self.batch_shape
        z, log_prob = self.guide.sample_and_log_prob(shape.numel())
        self._last = z.reshape(*shape, -1), log_prob.reshape(shape)
        return self._last

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws vectors whose globals carry a graph."""
        return self.rsample_and_log_prob(sample_shape)[0]

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws vectors without a graph."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of vectors of shape ``(*, features)``, that of the last draw by its graph."""
        if self._last is not None and self._last[0] is value:
            return self._last[1]
        return self.guide.log_prob(value)


def make_small_flow(features: int) -> Flow | Transform:
    """Makes the flow for a few globals."""
    if features == 1:
        return Elementwise(SumOfSquares(), features)
    return RealNVP(features, transforms=TRANSFORMS, network=mlp((WIDTH, WIDTH)), mixing=None)
