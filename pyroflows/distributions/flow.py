"""The distribution that a flow returns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints

from .._checks import check_batch_shape, check_context, check_tensor
from .._compat import dtype_of
from .._memory import Memory
from .._saturation import limit
from ..transforms import Transform
from ..transforms.base import check_transform

__all__ = ["FlowDistribution", "StandardNormal"]


class StandardNormal(dist.Normal):
    r"""The normal of mean zero and scale one, whose density takes no division: :math:`-x^2/2 - \log(2\pi)/2`.

    Example:
        >>> StandardNormal(torch.zeros(2), torch.ones(2)).log_prob(torch.zeros(2))
        tensor([-0.9189, -0.9189])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of values that broadcast to ``(*, *batch_shape)``, of that shape."""
        value, _ = torch.broadcast_tensors(value, self.loc)
        return value.square().mul(-0.5).sub(0.5 * math.log(2 * math.pi))


class FlowDistribution(dist.TransformedDistribution):
    r"""The distribution of :math:`y = g(f(x))` for :math:`x` from a base.

    The transform :math:`f` may be followed by a map :math:`g` onto a support.

    .. math:: \log p(y) = \log p_0(x) - \log|\det J_f(x)| - \log|\det J_g(f(x))|.

    A :class:`pyro.distributions.TransformedDistribution` that goes through the networks once per call and remembers its
    own last sample: scoring the very tensor that :meth:`rsample` returned costs no inversion. That score is a function
    of the parameters and the noise, along the sampling pass, so its gradient is the total one; for the partial
    derivative with respect to the value, score ``value.detach().requires_grad_()``.

    Args:
        base: Distribution of :math:`x`.
        transform: The map :math:`f`, without context or already conditioned.
        support: Constraint that values satisfy; :math:`g` is ``biject_to(support)``.
        path_gradient: Whether an ELBO gets the path gradient (sticking the landing) of this guide, which omits the
            score term of mean zero.
        validate_args: Whether to check values against the support.

    Raises:
        TypeError: If ``transform`` or ``support`` is of the wrong type.
        ValueError: If the transform still lacks its context, or if there is no bijection of vectors onto the support.

    Reference:
        Roeder, Wu, Duvenaud, "Sticking the landing: Simple, lower-variance gradient estimators for variational
        inference", 2017, https://arxiv.org/abs/1703.09194

    Example:
        >>> import pyroflows as pf
        >>> d = pf.RealNVP(features=2)()
        >>> x, log_prob = d.rsample_and_log_prob((5,))
        >>> x.shape, log_prob.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        base: torch.distributions.Distribution,
        transform: Transform,
        support: constraints.Constraint | None = None,
        path_gradient: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        if check_transform("transform", transform).context_shape is not None:
            owner = f"{type(transform).__name__} (give it by condition(context))"
            check_context(None, transform.context_shape, owner)
        self.transform = transform
        self.path_gradient = path_gradient
        self._support = support
        self._onto = [] if support is None else [bijection_onto(support)]
        self._memory = Memory()
        super().__init__(base, [transform, *self._onto], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        batch_shape = check_batch_shape("batch_shape", batch_shape)
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.transform, new.path_gradient = self.transform, self.path_gradient
        new._support, new._onto = self._support, self._onto
        new._memory = Memory()
        return super().expand(batch_shape, _instance=new)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The constraint that values satisfy."""
        # Not the codomain of the last transform, as torch has it: biject_to(greater_than(0)) calls its own the reals.
        support = self.transform.codomain if self._support is None else self._support
        spare = len(self.event_shape) - support.event_dim
        return constraints.independent(support, spare) if spare else support

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws reparametrised samples of shape ``sample_shape + batch_shape + event_shape``."""
        return self._generate(self._draw_base(self.base_dist.rsample, sample_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws samples without gradient."""
        with torch.no_grad():
            return self._generate(self._draw_base(self.base_dist.sample, sample_shape))

    def rsample_and_log_prob(
        self, sample_shape: Any = torch.Size(), keep: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Draws reparametrised samples and scores them in the same pass.

        Args:
            sample_shape: Shape of the sample.
            keep: Which samples along the first dimension to map and return. Noise is drawn for all
                of them, so that the random state moves on alike whatever is kept.

        Returns:
            Samples of shape ``sample_shape + batch_shape + event_shape`` and log-densities of shape
            ``sample_shape + batch_shape``.
        """
        x = self._draw_base(self.base_dist.rsample, sample_shape)[keep]
        y, log_det = self.transform.forward_and_log_det(x)
        value, log_det = self._constrain(y, log_det)
        return value, self._base_log_prob(x) - log_det

    def rsample_and_score(
        self, sample_shape: Any = torch.Size(), keep: slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Draws reparametrised samples with their log-densities and scores, in the same pass.

        The score :math:`\nabla_y \log p(y)` is taken at fixed parameters, as a path gradient needs it.

        Args:
            sample_shape: Shape of the sample.
            keep: As in :meth:`rsample_and_log_prob`.

        Returns:
            Samples of shape ``sample_shape + batch_shape + event_shape``, which carry a graph, and
            their log-densities and scores, which do not.

        Reference:
            Vaitl, Winkler, Richter, Kessel, "Fast and unified path gradient estimators for
            normalizing flows", 2024, https://arxiv.org/abs/2403.15881

        Example:
            >>> import pyroflows as pf
            >>> y, log_prob, score = pf.RealNVP(features=2)().rsample_and_score((5,))
            >>> torch.allclose(score, -y, atol=1e-6)  # a fresh flow is the standard normal
            True
        """
        if self._onto:
            value, _ = self.rsample_and_log_prob(sample_shape, keep)
            return value, *log_prob_and_score(self.log_prob, value)
        x = self._draw_base(self.base_dist.rsample, sample_shape)[keep]
        log_prob, score = log_prob_and_score(self._base_log_prob, x)
        y, log_det, score = self.transform.push_score(x, score)
        return y, log_prob - log_det.detach(), score

    def carried_score(self, value: Tensor) -> Tensor | None:
        """The score at ``value``, if this distribution carried it along when it drew that tensor."""
        last = self._memory.recall(value, self.transform._definition)
        return None if last is None else last.tag

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, of shape ``(*, *batch_shape)``, of values that broadcast to that shape
        before their event dimensions."""
        value = self._cast(self._check_value(value))
        # torch's check of a support fails on empty batches, and reads values, which a compiled graph cannot.
        if self._validate_args and value.numel() and not torch.compiler.is_compiling():
            self._validate_sample(value)
        last = self._memory.recall(value, self.transform._definition)
        if last is not None:
            if last.log_det.requires_grad:
                self._memory.clear()  # a graph can be walked back only once
            return self._base_log_prob(last.given) - last.log_det
        y, log_det_onto = value, value.new_zeros(())
        for onto in self._onto:
            y = onto.inv(value)
            log_det_onto = sum_rightmost(
                onto.log_abs_det_jacobian(y, value), self._spare_dims(onto)
            )
        x, log_det = self.transform.inverse_and_log_det(y)
        return self._base_log_prob(x) + log_det - log_det_onto

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """The terms of Pyro's gradient estimators, with the path gradient where it was asked for."""
        score = self.carried_score(x)
        parts = super().score_parts(x, *args, **kwargs)
        if score is None and self.path_gradient and torch.is_grad_enabled():
            # The density at a fixed value has the gradient of its own parameters only, which the path gradient omits.
            fixed = self.log_prob(x.detach())
            return ScoreParts(
                parts.log_prob, parts.score_function, parts.log_prob - fixed + fixed.detach()
            )
        if score is None:
            return parts
        # Equal to log q(x) in value; its gradient is the score times dx, with the density's own parameters held fixed.
        path = sum_rightmost((x - x.detach()) * score, len(self.event_shape))
        return ScoreParts(parts.log_prob, parts.score_function, parts.log_prob.detach() + path)

    def _check_value(self, value: Any) -> Tensor:
        try:
            return check_tensor("value", value, self.event_shape)
        except ValueError as error:
            raise ValueError(f"{error}{advise_features(self, value.shape)}") from None

    def _draw_base(self, draw: Callable[[torch.Size], Tensor], sample_shape: Any) -> Tensor:
        return self._cast(draw(check_batch_shape("sample_shape", sample_shape)))

    def _cast(self, value: Tensor) -> Tensor:
        """The value in the dtype of the parameters."""
        return value.to(dtype_of(self.transform) or value.dtype)

    def _generate(self, x: Tensor) -> Tensor:
        score = None
        if (
            self.path_gradient
            and not self._onto
            and torch.is_grad_enabled()
            and not torch.jit.is_tracing()
        ):
            _, score = log_prob_and_score(self._base_log_prob, x)
            y, log_det, score = self.transform.push_score(x, score)
        else:
            y, log_det = self.transform.forward_and_log_det(x)
        value, log_det = self._constrain(y, log_det)
        self._memory.keep(x, value, log_det, self.transform._definition, tag=score)
        return value

    def _constrain(self, y: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        for onto in self._onto:
            value = onto(y)
            log_det = log_det + sum_rightmost(
                onto.log_abs_det_jacobian(y, value), self._spare_dims(onto)
            )
            y = value
        return y, log_det

    def _spare_dims(self, onto: torch.distributions.Transform) -> int:
        return len(self.event_shape) - onto.codomain.event_dim

    def _base_log_prob(self, x: Tensor) -> Tensor:
        size = x.detach().abs().amax(tuple(range(-len(self.base_dist.event_shape), 0)))
        x = _without_gradient_far_out(x, size)
        base = self.base_dist
        if isinstance(base, torch.distributions.Independent):
            log_prob = sum_rightmost(base.base_dist.log_prob(x), base.reinterpreted_batch_ndims)
        else:
            log_prob = base.log_prob(x)
        return log_prob.to(x.dtype).masked_fill(size > limit(x.dtype, _EDGE), -math.inf)


#: Powers of the largest number of a dtype up to which a base gives gradients, and a density.
_REACH, _EDGE = 0.25, 0.45


def _without_gradient_far_out(x: Tensor, size: Tensor) -> Tensor:
    """Points, those out of reach as constants, and their entries at the edge.

    The gradient of a point grows with its size, and so does all that it multiplies on its way to
    the parameters: the product would overflow.
    """
    edge, dims = limit(x.dtype, _EDGE), x.dim() - size.dim()
    far = (size > limit(x.dtype, _REACH)).reshape(size.shape + (1,) * dims)
    return torch.where(far, x.detach().clamp(-edge, edge), x)


def advise_features(distribution: Any, shape: torch.Size) -> str:
    """Says how many features a support asks for, where values of a flow have another shape.

    Args:
        distribution: A distribution.
        shape: Shape of values that do not fit it.

    Returns:
        A sentence after a space; nothing where the support keeps shapes, or has none such as these.
    """
    if not isinstance(distribution, FlowDistribution):
        return ""
    for onto in distribution._onto:
        dims = onto.codomain.event_dim
        with contextlib.suppress(ValueError):
            event = shape[max(0, len(shape) - dims) :]
            needed = onto.inverse_shape(event)
            if needed != event and needed.numel():
                return (
                    f" Values of shape {tuple(event)} with the support {distribution._support} "
                    f"need features={needed.numel()}."
                )
    return ""


def log_prob_and_score(
    log_prob: Callable[[Tensor], Tensor], value: Tensor
) -> tuple[Tensor, Tensor]:
    """Evaluates a log density and its gradient with respect to the point.

    Args:
        log_prob: The log density of points of shape ``(*, *event_shape)``, of shape ``(*)``.
        value: The points.

    Returns:
        Tensors of shapes ``(*)`` and ``(*, *event_shape)``, without graph.
    """
    with torch.enable_grad():
        point = value.detach().requires_grad_()
        values = log_prob(point)
        total = values.sum()
    if not total.requires_grad:  # a uniform density
        return values, torch.zeros_like(point)
    (score,) = torch.autograd.grad(total, point, materialize_grads=True, allow_unused=True)
    return values.detach(), score


def sum_rightmost(value: Tensor, dims: int) -> Tensor:
    """Sums the last dimensions; torch's and Pyro's own fail on empty batches."""
    return value.sum(tuple(range(-dims, 0))) if dims else value


def bijection_onto(support: constraints.Constraint) -> torch.distributions.Transform:
    """The map from real vectors onto a support.

    Args:
        support: A constraint.

    Returns:
        ``biject_to(support)``.

    Raises:
        TypeError: If it is not a constraint.
        ValueError: If Pyro knows no bijection of vectors onto it.
    """
    if not isinstance(support, constraints.Constraint):
        raise TypeError(f"Expected support to be a constraint; got {support!r}.")
    try:
        onto = torch.distributions.biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"Expected a support with a bijection from real vectors; biject_to knows none for {support}."
        ) from None
    if not onto.bijective or onto.domain.event_dim > 1:
        raise ValueError(
            f"Expected a support with a bijection from real vectors; that of {support} is none."
        )
    return onto
