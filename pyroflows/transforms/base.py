"""The contract of every transform, and what follows from it: its inverse, and itself with a fixed context."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import constraints

from .._checks import (
    broadcast_batch,
    check_context,
    check_context_shape,
    check_shape,
)
from .._compat import definition_of, dtype_of
from .._memory import Memory
from .._saturation import saturate
from .._spec import Recorded
from ._inputs import admit, check_directions, check_pull, check_push

__all__ = ["Conditioned", "Inverse", "Transform"]

#: What is fast, in words.
FAST = {
    "both": "both directions",
    "forward": "sampling",
    "inverse": "scoring",
    "neither": "neither direction",
}


def vjp(outputs: Iterable[tuple[Tensor, Tensor]], at: Tensor) -> Tensor:
    r"""The vector-Jacobian product :math:`\sum_k v_k^\top \, \partial f_k / \partial x` at ``at``, keeping the graph.

    Args:
        outputs: Pairs :math:`(f_k, v_k)`; those that do not depend on ``at`` count nothing.
        at: Tensor with a gradient.

    Returns:
        Tensor of the shape of ``at``.
    """
    pairs = [(output, vector) for output, vector in outputs if output.requires_grad]
    if not pairs:
        return torch.zeros_like(at)
    values, vectors = zip(*pairs, strict=True)
    (product,) = torch.autograd.grad(values, at, vectors, retain_graph=True, allow_unused=True)
    return torch.zeros_like(at) if product is None else product


def channels_last(x: Tensor, event_shape: torch.Size) -> Tensor:
    """All values of each channel, the first dimension of an event, of shape ``(values, channels)``."""
    channels = event_shape[:1].numel()
    if len(event_shape) < 2:
        return x.reshape(-1, channels)
    return x.reshape(-1, channels, event_shape[1:].numel()).transpose(-1, -2).flatten(0, 1)


class Transform(Recorded, TransformModule, ConditionalTransform):
    r"""Base class of all transforms: an invertible map :math:`y = f(x; c)` from base to event with a known Jacobian.

    A subclass writes two methods, pure mathematics for tensors of shape ``(*batch, *event_shape)``:
    :meth:`forward_and_log_det` and :meth:`inverse_and_log_det`. All that torch and Pyro ask of a
    transform (``t(x)``, ``t.inv``, ``log_abs_det_jacobian``, ``domain``, ``codomain``, shapes,
    ``condition``) follows from them, so that it works in
    :class:`pyro.distributions.TransformedDistribution` and, when it takes a context, in
    :class:`pyro.distributions.ConditionalTransformedDistribution`.

    Points and contexts of any floating-point dtype and precision are taken, and computed in the
    dtype of the parameters, which is also that of the results; a map without parameters or buffers
    keeps the dtype of its points. What is not a floating-point tensor of the right shape is refused,
    in every direction.

    The last evaluation is remembered, so that ``log_abs_det_jacobian(x, t(x))`` and the score of a
    sample just drawn cost nothing more. What is remembered serves once and only while nothing has
    changed: neither a parameter, nor the tensors, nor the gradient mode.

    What cannot hold for a class, a class says by ``exempt_laws``, from names of laws to reasons,
    and by ``accuracy``, the relative error that its method leaves; :mod:`pyroflows.testing` judges
    by them.

    Args:
        features: Entries of a vector, or the shape of an event: ``(channels, height, width)``,
            ``(channels, time)``.
        context_features: Entries of the context, or ``None`` for a transform without one.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, if both forms of the context's shape are given and
            differ, or if a map of vectors is given another shape.

    Example:
        >>> class Double(Transform):
        ...     def forward_and_log_det(self, x, context=None):
        ...         return 2 * x, torch.full_like(x, 2.0).log().sum(-1)
        ...     def inverse_and_log_det(self, y, context=None):
        ...         return y / 2, -torch.full_like(y, 2.0).log().sum(-1)
        >>> t = Double(3)
        >>> t.inv(t(torch.ones(3)))
        tensor([1., 1., 1.])
    """

    bijective = True
    #: Whether a second evaluation at the same point gives the same, so that it can replace what was not kept.
    repeatable: bool = True
    #: Whether numbers of any size pass, as far as they do; in a flow they saturate, because an
    #: overflow in one row of a batch would make the gradients of all NaN.
    exact: bool = True
    #: Whether it is there to bring numbers of any size to the size of one, and takes them as they are.
    scales_down: ClassVar[bool] = False
    #: Laws of :mod:`pyroflows.testing` that cannot hold, each with the reason.
    exempt_laws: ClassVar[Mapping[str, str]] = {}

    #: Whether events can only be vectors, because the map mixes their entries.
    vectors_only: ClassVar[bool] = False

    def __init__(
        self,
        features: int | Sequence[int],
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = check_shape("features", features)
        if self.vectors_only and len(self.event_shape) != 1:
            raise ValueError(
                f"Expected features to be the entries of a vector, because {type(self).__name__} maps "
                f"vectors only; got the shape {tuple(self.event_shape)}."
            )
        self.context_shape = check_context_shape(context_features, context_shape)
        self._memory = Memory()
        self._inverse_ref: weakref.ref[Inverse] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_directions(cls)

    # What a subclass writes

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Maps base to event.

        Args:
            x: Points of shape ``(*, *event_shape)``.
            context: Context of shape ``(*, *context_shape)``, broadcast against the batch of ``x``.

        Returns:
            :math:`y` of shape ``(*, *event_shape)`` and :math:`\log|\det \partial y / \partial x|`
            of shape ``(*)``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward_and_log_det.")

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Maps event to base.

        Args:
            y: Points of shape ``(*, *event_shape)``.
            context: Context of shape ``(*, *context_shape)``, broadcast against the batch of ``y``.

        Returns:
            :math:`x` of shape ``(*, *event_shape)`` and :math:`\log|\det \partial x / \partial y|`
            of shape ``(*)``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define inverse_and_log_det.")

    @check_push
    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Maps base to event and carries the score of the density along.

        With :math:`s_x = \nabla_x \log q(x)`, the score of the transformed density is
        :math:`s_y = J^{-\top} (s_x - \nabla_x \log|\det J|)`, which is what a path gradient needs.
        The default differentiates the inverse; a transform with a cheaper recursion overrides it.

        Args:
            x: Points of shape ``(*, *event_shape)``, with gradients enabled.
            score: Score at ``x``, of the same shape, without gradient.
            context: Context of shape ``(*, *context_shape)``.

        Returns:
            :math:`y`, the log-determinant (both with gradients), and the score :math:`s_y`
            (without).

        Reference:
            Vaitl, Winkler, Richter, Kessel, "Fast and unified path gradient estimators for
            normalizing flows", 2024, https://arxiv.org/abs/2403.15881
        """
        return _carry_score(self.forward_and_log_det, self.inverse_and_log_det, x, score, context)

    @check_pull
    def pull_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Maps event to base and carries the score of the density along, as :meth:`push_score` does for the inverse.

        Args:
            y: Points of shape ``(*, *event_shape)``, with gradients enabled.
            score: Score at ``y``, of the same shape, without gradient.
            context: Context of shape ``(*, *context_shape)``.

        Returns:
            :math:`x`, the log-determinant (both with gradients), and the score :math:`s_x`
            (without).
        """
        return _carry_score(self.inverse_and_log_det, self.forward_and_log_det, y, score, context)

    @property
    def fast(self) -> str:
        """Which direction is fast: ``"forward"`` (to sample), ``"inverse"`` (to score), ``"both"`` or ``"neither"``."""
        return "both"

    # Shapes

    @property
    def features(self) -> int:
        """Entries of an event, whatever its shape."""
        return self.event_shape.numel()

    @property
    def context_features(self) -> int | None:
        """Entries of the context, whatever its shape; ``None`` without one."""
        return None if self.context_shape is None else self.context_shape.numel()

    def read_context(self, context: Tensor | None) -> Tensor | None:
        """The context as a vector, of shape ``(*, context_features)``."""
        dims = len(self.context_shape or ())
        return context if context is None or dims < 2 else context.flatten(-dims)

    def keep_within(self, x: Tensor) -> Tensor:
        """Entries as the layers of a flow see them, which saturate."""
        return x if self.exact else saturate(x)

    def broadcast(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Points with the batch dimensions that they share with their contexts."""
        dims = len(self.context_shape or ())
        return x.expand(broadcast_batch(x.shape, len(self.event_shape), context, dims))

    def entries(self, x: Tensor) -> Tensor:
        """The entries of events in one dimension, of shape ``(*, features)``."""
        dims = len(self.event_shape)
        return x if dims == 1 else x.reshape(*x.shape[: x.dim() - dims], self.features)

    def event(self, entries: Tensor) -> Tensor:
        """Events, of shape ``(*, *event_shape)``, from their entries in one dimension."""
        if len(self.event_shape) == 1:
            return entries
        return entries.reshape(entries.shape[:-1] + self.event_shape)

    # What torch and Pyro ask for

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """The constraint that points satisfy."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """The constraint that images satisfy."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def image_shape(self) -> torch.Size:
        """Shape of one point after the map."""
        shape = self.forward_shape(self.event_shape)
        return shape[len(shape) - self.codomain.event_dim :]

    @property
    def sign(self) -> int:
        if len(self.event_shape):
            raise AttributeError(
                f"Only maps of single numbers have a sign; {type(self).__name__} has none."
            )
        return 1

    def __call__(self, x: Tensor) -> Tensor:
        return self._evaluate(self._admit("x", x, self.event_shape), inverted=False)

    forward = __call__

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._evaluate(self._admit("y", y, self.image_shape), inverted=True)

    # By these names torch's own wrappers call.

    def _call(self, x: Tensor) -> Tensor:
        return self(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._inv_call(y)

    def _admit(self, name: str, value: Tensor, shape: torch.Size) -> Tensor:
        if self.context_shape is not None:
            owner = f"{type(self).__name__} (give it by condition(context))"
            check_context(None, self.context_shape, owner)
        return admit(self, name, value, shape, None)[0]

    def _evaluate(self, given: Tensor, inverted: bool) -> Tensor:
        memory = self._memory.recall(given, self._definition)
        if memory is not None and memory.tag != inverted:
            return memory.given
        result, log_det = (self.inverse_and_log_det if inverted else self.forward_and_log_det)(
            given
        )
        self._memory.keep(given, result, log_det, self._definition, tag=inverted)
        return result

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Returns :math:`\log|\det \partial y / \partial x|` for ``y = t(x)``, of the shape of the batch."""
        x = self._admit("x", x, self.event_shape)
        y = self._admit("y", y, self.image_shape)
        for given, result, inverted in ((x, y, False), (y, x, True)):
            memory = self._memory.recall(result, self._definition)
            if memory is not None and memory.given is given and memory.tag == inverted:
                if memory.log_det.requires_grad:
                    self._memory.clear()  # a graph can be walked back only once
                return -memory.log_det if inverted else memory.log_det
        if self.fast == "inverse":
            return -self.inverse_and_log_det(y)[1]
        return self.forward_and_log_det(x)[1]

    @property
    def inv(self) -> Transform:
        """The inverse transform: a module that shares these parameters, and whose own ``inv`` is this transform."""
        inverse = self._inverse_ref() if self._inverse_ref is not None else None
        if inverse is None:
            inverse = Inverse(self)
            self._inverse_ref = weakref.ref(inverse)
        return inverse

    def condition(self, context: Tensor) -> Transform:
        """Fixes the context.

        Args:
            context: Context of shape ``(*, *context_shape)``.

        Returns:
            A transform that shares these parameters and takes no context; this very transform where
            it takes none.

        Raises:
            ValueError: If the context has another shape.
        """
        if self.context_shape is None:
            return self
        return Conditioned(self, context)

    def with_cache(self, cache_size: int = 1) -> Transform:
        """Returns this transform, which needs no cache."""
        if cache_size not in (0, 1):
            raise ValueError(f"Expected cache_size to be 0 or 1; got {cache_size}.")
        return self

    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        shape, context = self.event_shape, self.context_shape
        described = f"{shape[0]}" if len(shape) == 1 else f"{tuple(shape)}"
        if context is not None:
            vector = len(context) == 1
            described += (
                f", context_features={context[0]}"
                if vector
                else f", context_shape={tuple(context)}"
            )
        return f"{described}, fast: {FAST[self.fast]}"

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            vars(parameter).pop(
                "unconstrained", None
            )  # a weak reference of Pyro's param store, which no pickle takes
        return {**super().__getstate__(), "_inverse_ref": None}

    def _definition(self) -> Iterable[Tensor | bool]:
        """What defines the map: its tensors, and which of its modules train."""
        return definition_of(self)


def _carry_score(
    there: Callable[..., tuple[Tensor, Tensor]],
    back: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    score: Tensor,
    context: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Carries a score one way by differentiating the map of the other."""
    y, log_det = there(x, context)
    with torch.enable_grad():
        point = y.detach().requires_grad_()
        x, log_det_back = back(point, context)
        pushed = vjp(
            [(x, score.expand_as(x)), (log_det_back, torch.ones_like(log_det_back))], point
        )
    return y, log_det, pushed


def check_transform(name: str, value: Any) -> Transform:
    """Returns ``value`` if it is a transform of this package.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(value, Transform):
        return value
    kind = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    raise TypeError(f"Expected {name} of type pyroflows.transforms.Transform; got {kind}.")


class Inverse(Transform):
    """The inverse of a transform, sharing its parameters.

    Args:
        transform: The transform to invert.

    Raises:
        TypeError: If it is not a :class:`Transform`.

    Example:
        >>> from pyroflows.transforms import Reverse
        >>> t = Reverse(3)
        >>> t.inv.inv is t
        True
    """

    def __init__(self, transform: Transform) -> None:
        check_transform("transform", transform)
        super().__init__(transform.image_shape, context_shape=transform.context_shape)
        self.transform = transform

    @property
    def fast(self) -> str:
        fast = self.transform.fast
        return {"forward": "inverse", "inverse": "forward"}.get(fast, fast)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transform.codomain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transform.domain

    @property
    def inv(self) -> Transform:
        transform = self.transform
        if transform._inverse_ref is None or transform._inverse_ref() is None:
            transform._inverse_ref = weakref.ref(self)
        return transform

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(x, context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(y, context)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.transform.pull_score(x, score, context)

    def pull_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.transform.push_score(y, score, context)

    # One memory serves both directions, so that t.inv(t(x)) is x without a second evaluation.

    def __call__(self, x: Tensor) -> Tensor:
        return self.transform._inv_call(x)

    forward = __call__

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.transform(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.transform.log_abs_det_jacobian(y, x)

    def condition(self, context: Tensor) -> Transform:
        return self.transform.condition(context).inv

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.transform.forward_shape(shape)


class Conditioned(Transform):
    """A transform whose context is fixed; its batch shape is broadcast against that of the context.

    So a context of shape ``(1, c)`` gives one vector a batch of one, and ``forward_shape``, on which
    the batch shape of a distribution rests, says so: ``(1, d)`` for ``(d,)``. Pyro's own conditional
    transforms say ``(d,)`` there, which is not the shape that they give. A context of shape
    ``(c,)`` keeps ``(d,)``.

    Args:
        transform: A transform with a context.
        context: Context of shape ``(*, *context_shape)``; a buffer, saved and moved with the
            module.

    Raises:
        TypeError: If ``transform`` is not a :class:`Transform`.
        ValueError: If the context has another shape.
    """

    context: Tensor

    def __init__(self, transform: Transform, context: Tensor) -> None:
        check_transform("transform", transform)
        super().__init__(transform.event_shape)
        self.transform = transform
        check_context(context, transform.context_shape, type(transform).__name__)
        self.register_buffer("context", context.to(dtype_of(transform) or context.dtype))

    @property
    def fast(self) -> str:
        return self.transform.fast

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transform.domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transform.codomain

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(x, self.context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(y, self.context)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.transform.push_score(x, score, self.context)

    def pull_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.transform.pull_score(y, score, self.context)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self._broadcast_shape(self.transform.forward_shape(shape), self.codomain.event_dim)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self._broadcast_shape(self.transform.inverse_shape(shape), self.domain.event_dim)

    def _broadcast_shape(self, shape: torch.Size, event_dim: int) -> torch.Size:
        dims = len(self.transform.context_shape or ())
        return broadcast_batch(shape, event_dim, self.context, dims)

    def extra_repr(self) -> str:
        return f"context of shape {tuple(self.context.shape)}"
