"""Residual flows: the identity plus a contraction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_positive
from ..nn import MLP
from ..univariate._numeric import readable
from ._inputs import set_aside
from ._jacobian import Feedforward, Jacobian, check_trace
from ._linalg import widened
from .base import Transform

__all__ = ["Residual"]

#: With ``trace="auto"`` the log-determinant is exact up to this many entries.
EXACT_FEATURES = 32

#: Lipschitz constants of activations, rounded up.
_LIPSCHITZ: dict[type[nn.Module], float] = {
    nn.SiLU: 1.1,
    nn.GELU: 1.13,
    nn.Mish: 1.09,
    nn.Tanh: 1.0,
    nn.ELU: 1.0,
    nn.Softplus: 1.0,
    nn.Softsign: 1.0,
    nn.Sigmoid: 0.25,
}

#: Terms of the power series that are always summed, and squarings of the Gram matrix.
_SURE, _SQUARINGS = 2, 6


def spectral_bound(weight: Tensor) -> Tensor:
    r"""An upper bound of the spectral norm of a matrix, smooth in the matrix.

    It is the Schatten norm of order :math:`p = 2^8`, which exceeds the spectral norm by a factor of
    at most :math:`n^{1/p}` (1.7 % for 64 singular values that are all equal), computed by squaring
    the Gram matrix. A ridge and a factor of some roundings keep it above the spectral norm in
    floating point too.

    Args:
        weight: Matrix.

    Returns:
        A scalar.

    Reference:
        Delattre, Barthélemy, Araujo, Allauzen, "Efficient bound of Lipschitz constant for
        convolutional layers by Gram iteration", 2023, https://arxiv.org/abs/2305.16173
    """
    size = weight.detach().abs().amax().clamp(min=1.0)
    scaled = weight / size
    gram = scaled @ scaled.mT if weight.shape[0] <= weight.shape[1] else scaled.mT @ scaled
    roundings = sum(weight.shape) * torch.finfo(weight.dtype).eps
    gram = gram + roundings * torch.eye(gram.shape[0], dtype=weight.dtype, device=weight.device)
    # What each square is divided by cancels in the end, so that no gradient need pass through it.
    outside = torch.ones_like(size)
    for squaring in range(_SQUARINGS):
        norm = torch.linalg.vector_norm(gram.detach())
        outside = outside * norm**0.5**squaring
        gram = gram / norm
        gram = gram @ gram
    bound = outside * torch.linalg.vector_norm(gram) ** 0.5**_SQUARINGS
    return size * bound.sqrt() * (1 + roundings)


class Residual(Transform):
    r"""A residual block, whose inverse is the identity plus a contraction :math:`g`.

    .. math:: x = y + g(y; c), \quad \operatorname{Lip}(g) \le q < 1, \quad
        \log\Big|\det \frac{\partial x}{\partial y}\Big| = \log\det(I + J_g)
        = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J_g^k.

    Scoring is the closed form. Sampling iterates :math:`y \leftarrow x - g(y)`, which shrinks the
    error by :math:`q` each time, then takes Newton's steps; what comes out is certified by
    :math:`|y - y^*| \le |x - y - g(y)| / (1 - q)`, and its gradients are those of the implicit
    function theorem. Where nothing may be read from the device (under ``vmap``, in a compiled
    graph) the number of iterations is fixed by :math:`q` and the precision. The block starts at the
    identity.

    The network is :math:`g = \min(1, q / L) \, \mathrm{net}`, with :math:`L` the product of an
    upper bound of each weight's spectral norm and of the activations' Lipschitz constants. The
    context moves the first hidden layer only, so that the bound holds for every context.

    An exact log-determinant costs ``features`` passes through the network. For large vectors it is
    replaced *in training mode* by an unbiased estimate with random signs, the power series cut at a
    random place, and Neumann's series for its gradient; it draws from torch's global generator. In
    evaluation mode the log-determinant is always exact. Under ``vmap`` and ``torch.compile`` the
    series is cut at a fixed place, where its remainder is below the square root of the precision.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context :math:`c`, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        hidden: Widths of the network.
        activation: Its activation, a callable without arguments that makes a module: one of
            ``SiLU``, ``GELU``, ``Mish``, ``Tanh``, ``ELU``, ``Softplus``, ``Softsign`` and
            ``Sigmoid`` of :mod:`torch.nn`, or any elementwise module with its constant as an
            attribute ``lipschitz``. ``SiLU``, divided by its constant, is the LipSwish of the
            paper.
        lipschitz: The bound :math:`q`. Near 1 a block can do more and is slower to sample from.
        trace: ``"exact"``, ``"hutchinson"`` for the estimate, or ``"auto"``: exact up to 32
            entries.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a size is not positive, ``lipschitz`` is not within (0, 1), the activation's
            constant is not known or ``trace`` is no such word.
        RuntimeError: When sampling, if a point is not certified.

    Reference:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", 2019,
        https://arxiv.org/abs/1811.00995

        Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling",
        2019, https://arxiv.org/abs/1906.02735

    Example:
        >>> t = Residual(3, context_features=2)
        >>> t.condition(torch.zeros(2)).inv(torch.ones(5, 3)).shape
        torch.Size([5, 3])
    """

    vectors_only = True
    fast = "inverse"

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        lipschitz: float = 0.9,
        trace: str = "auto",
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        n = self.features
        self.network = MLP(n, n, self.context_features, hidden=hidden, activation=activation)
        self.network.start_at(torch.zeros(n))
        self.lipschitz = _check_lipschitz(lipschitz)
        self.trace = check_trace(trace)
        self._constant = _activation_constant(self.network.activation, activation)

    @property
    def _exact(self) -> bool:
        exact = self.trace == "exact" or (self.trace == "auto" and self.features <= EXACT_FEATURES)
        return exact or not self.training

    def _contraction(self, context: Tensor | None) -> Feedforward:
        network = Feedforward.of(self.network, self.read_context(context))
        slopes = self._constant ** (len(network.weights) - 1)
        bound = torch.stack([spectral_bound(weight) for weight in network.weights]).prod() * slopes
        scale = (bound / self.lipschitz).clamp(min=1.0)
        weights, shifts = (*network.weights[:-1], network.weights[-1] / scale), network.shifts
        return network._replace(weights=weights, shifts=(*shifts[:-1], shifts[-1] / scale))

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        value, jacobian = self._contraction(context).linearise(y)
        x = y + value
        return x, self._log_det(jacobian, x)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x, context = set_aside(self, x, context)
        contraction, exact = self._contraction(context), self._exact
        eps = torch.finfo(x.dtype).eps
        y = self._fixed_point(contraction, x, eps**0.5 if exact else eps)
        # Steps of Newton carry the derivatives: the first those of first order, the second up to those of third.
        for _ in range(2 if exact else 1):
            value, jacobian = contraction.linearise(y)
            residual = y + value - x
            y = y - (
                _solve(jacobian, residual) if exact else self._neumann(jacobian.detach(), residual)
            )
        value, jacobian = contraction.linearise(y)
        self._certify(x, y, value)
        return y, -self._log_det(jacobian, y)

    # Sampling

    def _rounds(self, tolerance: float) -> int:
        """Iterations after which the error is surely below a multiple of the first step."""
        return math.ceil(math.log(tolerance * (1 - self.lipschitz)) / math.log(self.lipschitz))

    @torch.no_grad()
    def _fixed_point(self, contraction: Feedforward, x: Tensor, tolerance: float) -> Tensor:
        x = x.detach()
        y = x - contraction(x)
        stops, q = readable(y), self.lipschitz
        for _ in range(self._rounds(tolerance)):
            last, y = y, x - contraction(y)
            if stops and bool(((y - last).abs() * q <= tolerance * (1 - q) * _size(x, y)).all()):
                break
        return y

    def _neumann(self, jacobian: Jacobian, vector: Tensor) -> Tensor:
        r"""Solves :math:`(I + J) z = v` by its series, of which one term is enough where nothing is differentiated."""
        z = vector
        for _ in range(
            self._rounds(torch.finfo(vector.dtype).eps) if torch.is_grad_enabled() else 0
        ):
            z = vector - jacobian.push(z)
        return z

    @torch.no_grad()
    def _certify(self, x: Tensor, y: Tensor, value: Tensor) -> None:
        error = (x - y - value).abs() / (1 - self.lipschitz)
        if not readable(error):
            return
        tolerance = 1000 * torch.finfo(x.dtype).eps / (1 - self.lipschitz)
        missed = ~(error <= tolerance * _size(x, y)).all(-1) & x.isfinite().all(-1)
        if bool(missed.any()):
            raise RuntimeError(
                f"The fixed point of {type(self).__name__} does not converge: {int(missed.sum())} of {missed.numel()} "
                f"points may be wrong by {float(error[missed].max()):.3g}. Are its parameters and context finite, and is "
                f"the Lipschitz constant of its activation right?"
            )

    # The log-determinant

    def _log_det(self, jacobian: Jacobian, at: Tensor) -> Tensor:
        """Log-determinant of the identity plus the Jacobian."""
        if not self._exact:
            return self._estimate(jacobian, torch.randn_like(at).sign())
        # No determinant is taken in the 16 bits of autocast.
        (matrix,) = widened(_identity_plus(jacobian).to(at.dtype))
        return torch.linalg.slogdet(matrix)[1].to(at.dtype).expand(at.shape[:-1])

    def _estimate(self, jacobian: Jacobian, noise: Tensor) -> Tensor:
        r"""An unbiased estimate, whose gradient is an unbiased estimate of the gradient.

        With :math:`w_k = 1 / P(N \ge k)` the value is
        :math:`\sum_{k=1}^N (-1)^{k+1} w_k v^\top J^k v / k` and the gradient that of
        :math:`u^\top J v` with :math:`u = \sum_{k=1}^N (-1)^{k+1} w_k (J^\top)^{k-1} v` held fixed.
        """
        fixed, pulled = jacobian.detach(), noise
        value, adjoint = torch.zeros_like(noise[..., 0]), torch.zeros_like(noise)
        with torch.no_grad():
            for k, weight in enumerate(self._roulette(noise), 1):
                weight = weight if k % 2 else -weight
                adjoint = adjoint + weight * pulled
                pulled = fixed.pull(pulled)
                value = value + weight / k * (pulled * noise).sum(-1)
        surrogate = (adjoint * jacobian.push(noise)).sum(-1)
        return value + (surrogate - surrogate.detach())

    def _roulette(self, noise: Tensor) -> list[float]:
        r"""Weights :math:`1 / P(N \ge k)` for :math:`k = 1, \dots, N` with a random :math:`N`.

        Each term beyond the sure ones is summed with probability :math:`q`, given the one before
        it. As :math:`|\operatorname{tr} J^k| \le D q^k`, no term is then weighted above
        :math:`D / k` and the variance is finite.
        """
        if not readable(noise):
            return [1.0] * self._rounds(torch.finfo(noise.dtype).eps ** 0.5)
        draw = float(torch.rand((), dtype=torch.float64, device="cpu"))
        more = math.floor(math.log1p(-draw) / math.log(self.lipschitz))
        return [1.0] * _SURE + [self.lipschitz**-j for j in range(1, more + 1)]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lipschitz={self.lipschitz}, trace={self.trace!r}"


def _identity_plus(jacobian: Jacobian) -> Tensor:
    matrix = jacobian.matrix()
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _solve(jacobian: Jacobian, vector: Tensor) -> Tensor:
    solved = torch.linalg.solve(*widened(_identity_plus(jacobian), vector.unsqueeze(-1)))
    return solved.squeeze(-1).to(vector.dtype)


def _size(x: Tensor, y: Tensor) -> Tensor:
    """The scale that rounding errors are measured by."""
    return 1 + x.abs().amax(-1, keepdim=True) + y.abs().amax(-1, keepdim=True)


def _check_lipschitz(value: Any) -> float:
    if check_positive("lipschitz", value) >= 1:
        raise ValueError(
            "Expected lipschitz within (0, 1), because only then is the map invertible; got "
            f"{value}."
        )
    return float(value)


def _activation_constant(module: nn.Module, activation: Any) -> float:
    constant = getattr(module, "lipschitz", None)
    if constant is not None:
        return check_positive("lipschitz of the activation", constant)
    if type(module) not in _LIPSCHITZ:
        names = ", ".join(known.__name__ for known in _LIPSCHITZ)
        raise ValueError(
            f"Expected activation to be one of {names}, or to have its Lipschitz constant as an attribute lipschitz; "
            f"got {getattr(activation, '__name__', activation)}."
        )
    return max(_LIPSCHITZ[type(module)], float(getattr(module, "alpha", 0.0)))
