"""Residual maps of low rank whose inverses are closed or a few scalar roots: planar, radial, Sylvester."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_size
from ..nn.network import Network, mlp
from ..univariate._numeric import invert
from ._linalg import multiply, solve_columns, solve_triangle
from .orthogonal import accumulate
from .parametric import Parametric

__all__ = ["Planar", "Radial", "Sylvester"]

#: How far products that must exceed -1 stay above it, and numbers that must be positive above 0.
_MARGIN = 1e-3


def _above_minus_one(raw: Tensor) -> Tensor:
    """A smooth increasing map onto the numbers above -1, by a margin, which leaves positive numbers as they are."""
    reach = 1 - _MARGIN
    return reach * F.elu(raw / reach)


def _positive(raw: Tensor) -> Tensor:
    """A smooth increasing map onto the positive numbers, by a margin, which takes 0 to 1."""
    return F.softplus(raw + math.log(math.expm1(1 - _MARGIN))) + _MARGIN


def _bend(x: Tensor, steepness: Tensor, size: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    r"""The map :math:`x + r \tanh(t x + b)` of the line with :math:`r t > -1`, and the logarithm of its slope."""
    h = torch.tanh(torch.addcmul(offset, steepness, x))
    return torch.addcmul(x, size, h), torch.log1p(size * steepness * (1 - h.square()))


class Planar(Parametric):
    r"""A planar flow, which bends the space along one hyperplane.

    .. math:: y = x + \hat u \tanh(w^\top x + b), \quad
        \log|\det J| = \log\left(1 + \hat u^\top w \, (1 - \tanh^2(w^\top x + b))\right).

    It is invertible as long as :math:`w^\top \hat u > -1`. Where :math:`p = w^\top u` is negative,
    :math:`\hat u = u + (m(p) - p)\, w / |w|^2` with :math:`m(p) = a (e^{p / a} - 1)`,
    :math:`a = 0.999`; elsewhere :math:`\hat u = u`. Sampling is fast; to score, one increasing
    function of one number, :math:`w^\top x`, is inverted numerically for every point. The map
    starts at the identity, :math:`u = 0`, with a random :math:`w`. With a context, :math:`u, w, b`
    are the output of a network.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive.

    Reference:
        Rezende, Mohamed, "Variational inference with normalizing flows", 2015,
        https://arxiv.org/abs/1505.05770

    Example:
        >>> t = Planar(2)
        >>> x = torch.tensor([1.0, -2.0])
        >>> torch.testing.assert_close(t.inv(t(x).detach()), x)
        >>> t.fast
        'forward'
    """

    vectors_only = True
    fast = "forward"

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        n = self.features
        table = torch.zeros(2 * n + 1)
        nn.init.normal_(table[n : 2 * n], std=n**-0.5)
        self.start(network, raw=table)

    def _push(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""The direction :math:`\hat u`, the normal :math:`w`, the product :math:`w^\top \hat u`, the offset :math:`b`."""
        n = self.features
        u, w, b = self.parameters_for(context).split([n, n, 1], -1)
        product = (w * u).sum(-1, keepdim=True)
        allowed = _above_minus_one(product)
        square = w.square().sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        return (
            torch.addcmul(u, (allowed - product) / square, w),
            w,
            allowed.squeeze(-1),
            b.squeeze(-1),
        )

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        u, w, product, b = self._push(context)
        h = torch.tanh((w * x).sum(-1) + b)
        return torch.addcmul(x, u, h.unsqueeze(-1)), torch.log1p(product * (1 - h.square()))

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        u, w, product, b = self._push(context)
        level, log_det = invert(
            lambda z: _bend(z, torch.ones_like(b), product, b), (w * y).sum(-1), "Planar"
        )
        return torch.addcmul(y, u, -torch.tanh(level + b).unsqueeze(-1)), log_det

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, w, product, b = self._push(context)
        h = torch.tanh((w * x).sum(-1) + b)
        slope = 1 - h.square()
        y, log_det = torch.addcmul(x, u, h.unsqueeze(-1)), torch.log1p(product * slope)
        with torch.no_grad():
            # J = I + slope u w', so its transpose is inverted by one more product (Sherman and Morrison).
            total = 1 + product * slope
            score = score + (2 * product * h * slope / total).unsqueeze(-1) * w
            pushed = score - (slope * (u * score).sum(-1) / total).unsqueeze(-1) * w
        return y, log_det, pushed


class Radial(Parametric):
    r"""A radial flow, which stretches or squeezes the space around one point.

    .. math:: y = x + \frac{k\, (x - x_0)}{1 + s}, \quad s = |x - x_0| / \alpha, \quad
        \log|\det J| = (D - 1) \log\left(1 + \frac{k}{1 + s}\right) + \log\left(1 + \frac{k}{(1 + s)^2}\right),

    with :math:`\alpha > 0` and :math:`k > -1`; the :math:`\beta` of the paper is :math:`k \alpha`.
    The distance from :math:`x_0` is the root of a quadratic, so both directions are fast. The map
    starts at the identity, :math:`k = 0`, around a random point. With a context,
    :math:`x_0, \alpha, k` are the output of a network.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive.

    Reference:
        Rezende, Mohamed, "Variational inference with normalizing flows", 2015,
        https://arxiv.org/abs/1505.05770

    Example:
        >>> t = Radial(2)
        >>> x = torch.tensor([1.0, -2.0])
        >>> torch.testing.assert_close(t.inv(t(x).detach()), x)
        >>> t.fast
        'both'
    """

    vectors_only = True

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        table = torch.zeros(self.features + 2)
        nn.init.normal_(table[: self.features])
        self.start(network, raw=table)

    def _centre(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        n = self.features
        centre, alpha, k = self.parameters_for(context).split([n, 1, 1], -1)
        return centre, _positive(alpha), _above_minus_one(k)

    def _log_det(self, k: Tensor, s: Tensor) -> Tensor:
        log_across, log_along = torch.log1p(k / (1 + s)), torch.log1p(k / (1 + s) / (1 + s))
        return ((self.features - 1) * log_across + log_along).squeeze(-1)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        centre, alpha, k = self._centre(context)
        offset = x - centre
        s = _length(offset) / alpha
        return torch.addcmul(x, k / (1 + s), offset), self._log_det(k, s)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        centre, alpha, k = self._centre(context)
        offset = y - centre
        s = _radius(_length(offset) / alpha, k)
        return torch.addcmul(y, -k / (1 + s + k), offset), -self._log_det(k, s)


def _length(x: Tensor) -> Tensor:
    """The length of vectors, whose squares may overflow or underflow."""
    size = x.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return size * torch.linalg.vector_norm(x / size, dim=-1, keepdim=True)


def _radius(target: Tensor, k: Tensor) -> Tensor:
    r"""The root :math:`s \ge 0` of :math:`s + k s / (1 + s) = r`, that is of :math:`s^2 + (1 + k - r) s - r = 0`.

    In units of :math:`1 + k + r > 0` nothing overflows, and the branch of the formula avoids the
    difference of near numbers.
    """
    unit = 1 + k + target
    half, r = (1 + k - target) / unit, target / unit
    falls = half < 0
    size = torch.where(falls, -half, half)
    total = size + (half.square() + 4 * r / unit).sqrt()
    return torch.where(falls, 0.5 * unit * total, 2 * r / total)


class Sylvester(Parametric):
    r"""A Sylvester flow: planar flows of several directions at once.

    .. math:: y = x + Q R \tanh(\tilde R Q^\top x + b), \quad
        \log|\det J| = \sum_{i=1}^M \log\left(1 + R_{ii} \tilde R_{ii} (1 - h_i^2)\right), \quad
        h = \tanh(\tilde R Q^\top x + b),

    where the :math:`M` columns of :math:`Q` are orthonormal, a product of :math:`M` reflections,
    and :math:`R, \tilde R` are upper-triangular with :math:`\tilde R_{ii} > 0` and
    :math:`R_{ii} \tilde R_{ii} > -1`. Sampling is fast. To score,
    :math:`Q^\top y = z + R \tanh(\tilde R z + b)` is solved for :math:`z` from the last entry to
    the first, each by the numeric inverse of an increasing function of one number, so its cost is
    that of :math:`M` planar flows. The map starts at the identity, :math:`R = 0`, with random
    :math:`Q`. With a context, :math:`Q, R, \tilde R, b` are the output of a network.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        units: Number :math:`M` of directions, at most ``features``, which is the default.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive or ``units`` exceeds ``features``.

    Reference:
        van den Berg, Hasenclever, Tomczak, Welling, "Sylvester normalizing flows for variational
        inference", 2018, https://arxiv.org/abs/1803.05649

    Example:
        >>> t = Sylvester(3, units=2)
        >>> x = torch.tensor([1.0, -2.0, 3.0])
        >>> torch.testing.assert_close(t.inv(t(x).detach()), x)
        >>> t.fast
        'forward'
    """

    vectors_only = True
    fast = "forward"

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        units: int | None = None,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        n = self.features
        m = n if units is None else check_size("units", units)
        if m > n:
            raise ValueError(f"Expected units <= features, which are {n}; got {units}.")
        self.units = m
        table = torch.zeros(m * (n + 2 * m + 1))
        nn.init.normal_(table[: m * n])
        self.start(network, raw=table)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r""":math:`Q` of shape ``(*, features, units)``, :math:`R`, :math:`\tilde R` and :math:`b`."""
        n, m = self.features, self.units
        vectors, outer, inner, b = self.parameters_for(context).split([m * n, m * m, m * m, m], -1)
        units, mixing = accumulate(vectors.unflatten(-1, (m, n)))
        weights = solve_columns(mixing, units[..., :m], upper=True)
        q = torch.eye(n, m, dtype=b.dtype, device=b.device) - units.mT @ weights
        outer, inner = outer.unflatten(-1, (m, m)), inner.unflatten(-1, (m, m))
        steepness = _positive(_diagonal(inner))
        size = _above_minus_one(_diagonal(outer)) / steepness
        return (
            q,
            outer.triu(1) + torch.diag_embed(size),
            inner.triu(1) + torch.diag_embed(steepness),
            b,
        )

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        q, outer, inner, b = self._parts(context)
        h = torch.tanh(multiply(inner, multiply(q.mT, x)) + b)
        y = x + multiply(q, multiply(outer, h))
        return y, torch.log1p(_diagonal(outer) * _diagonal(inner) * (1 - h.square())).sum(-1)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        q, outer, inner, b = self._parts(context)
        v, product = multiply(q.mT, y), _diagonal(outer) * _diagonal(inner)
        with torch.no_grad():
            z = _substitute(v, outer, inner, b)
        # Two steps of Newton, of no size, carry the derivatives (see the numeric inverse), for all units at once.
        for _ in range(2 if torch.is_grad_enabled() else 0):
            h = torch.tanh(multiply(inner, z) + b)
            step = solve_triangle(
                _within(outer, inner, 1 - h.square()), z + multiply(outer, h) - v, upper=True
            )
            z = z - (step - step.detach())
        h = torch.tanh(multiply(inner, z) + b)
        return y - multiply(q, multiply(outer, h)), -torch.log1p(product * (1 - h.square())).sum(-1)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, outer, inner, b = self._parts(context)
        h = torch.tanh(multiply(inner, multiply(q.mT, x)) + b)
        slope, product = 1 - h.square(), _diagonal(outer) * _diagonal(inner)
        y, log_det = x + multiply(q, multiply(outer, h)), torch.log1p(product * slope).sum(-1)
        with torch.no_grad():
            # J = I + Q A Q' with an upper-triangular A, so its transpose is inverted in the space of the units.
            curvature = 2 * product * h * slope / (1 + product * slope)
            score = score + multiply(q, multiply(inner.mT, curvature))
            within = multiply(q.mT, score)
            solved = solve_triangle(
                _within(outer, inner, slope), within, upper=True, transposed=True
            )
            pushed = score + multiply(q, solved - within)
        return y, log_det, pushed


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _within(outer: Tensor, inner: Tensor, slope: Tensor) -> Tensor:
    r"""The Jacobian of :math:`z + R \tanh(\tilde R z + b)`, which is upper-triangular."""
    return torch.diag_embed(torch.ones_like(slope)) + (outer * slope.unsqueeze(-2)) @ inner


def _substitute(v: Tensor, outer: Tensor, inner: Tensor, b: Tensor) -> Tensor:
    r"""Solves :math:`z + R h = v`, :math:`h = \tanh(\tilde R z + b)`, from the last entry to the first."""
    z = h = v[..., :0]
    for i in reversed(range(v.shape[-1])):
        offset = b[..., i] + (inner[..., i, i + 1 :] * z).sum(-1)
        target = v[..., i] - (outer[..., i, i + 1 :] * h).sum(-1)
        bend = partial(_bend, steepness=inner[..., i, i], size=outer[..., i, i], offset=offset)
        root = invert(bend, target, "Sylvester")[0].unsqueeze(-1)
        z = torch.cat([root, z], -1)
        h = torch.cat([torch.tanh(inner[..., i, i, None] * root + offset.unsqueeze(-1)), h], -1)
    return z
