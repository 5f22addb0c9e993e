"""Linear maps: by triangular factors, and by the exponential of a matrix."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import linear

from .._checks import check_size
from .._saturation import limit_log
from ..nn.network import Network, mlp
from ._linalg import multiply, solve_triangle
from .parametric import Parametric
from .permute import inverse_permutation

__all__ = ["LULinear", "MatrixExponential"]


class LinearMap(Parametric):
    """Base class of linear maps, which say how to multiply with their matrix and how to solve, given the raw numbers."""

    vectors_only = True

    @abstractmethod
    def _multiply(self, raw: Tensor, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _solve(self, raw: Tensor, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _solve_transposed(self, raw: Tensor, score: Tensor) -> Tensor: ...

    def _log_det(self, raw: Tensor) -> Tensor:
        return raw.new_zeros(()).expand(raw.shape[: raw.dim() - 2])

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        raw = self.parameters_for(context)
        y = self._multiply(raw, x)
        return y, self._log_det(raw).expand(y.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        raw = self.parameters_for(context)
        x = self._solve(raw, y)
        return x, -self._log_det(raw).expand(x.shape[:-1])

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        raw = self.parameters_for(context)
        y = self._multiply(raw, x)
        with torch.no_grad():
            pushed = self._solve_transposed(raw, score.expand(y.shape))
        return y, self._log_det(raw).expand(y.shape[:-1]), pushed


class LULinear(LinearMap):
    r"""An invertible matrix by its factors, :math:`y = P L U x + b`, as the 1 x 1 convolution of Glow.

    :math:`P` is a fixed permutation, :math:`L` lower-triangular with a unit diagonal, :math:`U`
    upper-triangular with the diagonal :math:`\pm e^{d_i}` of fixed signs, so that
    :math:`\log|\det W| = \sum_i d_i`. One table of raw numbers holds them as LAPACK does: :math:`L`
    below the diagonal, :math:`d` on it, :math:`U` above, and :math:`b` in one more row. It starts
    at the identity, with ``rotate`` at a random rotation. With a context, the table is the output
    of a network.

    Where entries are independent, however far from normal, the identity between two layers is a
    saddle point: no gradient tells a turn from its opposite. To start a little turned is to start
    beside it.

    Sampling multiplies by the matrix, or by its triangles one after the other where there are fewer
    points than entries, and scoring solves with the triangles.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        bias: Whether there is an offset :math:`b`.
        rotate: ``True`` to start at a random rotation, as in Glow; a number between :math:`-\pi`
            and :math:`\pi` to start at one by about that angle, in radians, or with a minus at its
            inverse.
        seed: Seed of that rotation, which depends on nothing else.
        network: Factory of the network that reads the context.

    Raises:
        TypeError: If ``rotate`` is neither a boolean nor a number.
        ValueError: If a size is not positive, ``seed`` is negative or ``rotate`` is no angle.

    Reference:
        Kingma, Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018,
        https://arxiv.org/abs/1807.03039

    Example:
        >>> t = LULinear(3, rotate=True)
        >>> y = t(torch.tensor([3.0, 0.0, 4.0]))
        >>> torch.testing.assert_close(y.norm(), torch.tensor(5.0))
        >>> torch.testing.assert_close(t.inv(y), torch.tensor([3.0, 0.0, 4.0]))
    """

    permutation: Tensor
    inverse_permutation: Tensor
    signs: Tensor

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        bias: bool = True,
        rotate: bool | float = False,
        seed: int = 0,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        check_size("seed", seed, least=0)
        start = _start(self.features, rotate, seed)
        factors, pivots = torch.linalg.lu_factor(start)
        permutation = torch.lu_unpack(factors, pivots, unpack_data=False)[0].argmax(-1).tolist()
        diagonal = factors.diagonal()
        table = factors - diagonal.diag() + diagonal.abs().log().diag()
        if bias:
            table = torch.cat([table, table.new_zeros(1, self.features)])
        # By way of lists, so that the tensors are of the default dtype and on the default device.
        self.start(network, raw=torch.tensor(table.tolist()))
        self.register_buffer("permutation", torch.tensor(permutation))
        self.register_buffer("inverse_permutation", torch.tensor(inverse_permutation(permutation)))
        self.register_buffer("signs", torch.tensor(diagonal.sign().tolist()))

    def _triangles(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`L` without its diagonal of ones, and :math:`U`."""
        raw = raw[..., : self.signs.shape[0], :]
        diagonal = self.signs * limit_log(raw.diagonal(dim1=-2, dim2=-1)).exp()
        return raw.tril(-1), raw.triu(1) + torch.diag_embed(diagonal)

    def _bias(self, raw: Tensor) -> Tensor | None:
        return raw[..., -1, :] if raw.shape[-2] > raw.shape[-1] else None

    def _log_det(self, raw: Tensor) -> Tensor:
        return limit_log(raw.diagonal(dim1=-2, dim2=-1)).sum(-1)

    def _multiply(self, raw: Tensor, x: Tensor) -> Tensor:
        lower, upper = self._triangles(raw)
        # A graph for batches of every size must not ask how many points there are.
        many = torch.compiler.is_compiling() or x[..., 0].numel() >= x.shape[-1]
        if raw.dim() == 2 and many:
            # For no fewer points than entries, the product of the triangles costs less than a second pass over the points.
            matrix = torch.addmm(upper, lower, upper).index_select(0, self.permutation)
            return linear(x, matrix, self._bias(raw))
        half = multiply(upper, x)
        y, bias = (half + multiply(lower, half)).index_select(-1, self.permutation), self._bias(raw)
        return y if bias is None else y + bias

    def _solve(self, raw: Tensor, y: Tensor) -> Tensor:
        (lower, upper), bias = self._triangles(raw), self._bias(raw)
        y = (y if bias is None else y - bias).index_select(-1, self.inverse_permutation)
        return solve_triangle(upper, solve_triangle(lower, y, unit_diagonal=True), upper=True)

    def _solve_transposed(self, raw: Tensor, score: Tensor) -> Tensor:
        lower, upper = self._triangles(raw)
        score = solve_triangle(upper, score, upper=True, transposed=True)
        return solve_triangle(lower, score, transposed=True, unit_diagonal=True).index_select(
            -1, self.permutation
        )


def _start(features: int, rotate: bool | float, seed: int) -> Tensor:
    """The matrix at which ``LULinear`` starts, in double precision on the CPU."""
    if rotate is True:
        return random_rotation(features, seed)
    if not isinstance(rotate, Real):
        raise TypeError(f"Expected rotate to be a boolean or a number; got {rotate!r}.")
    if not -math.pi <= rotate <= math.pi:
        raise ValueError(f"Expected rotate to be an angle between -pi and pi; got {rotate}.")
    return slight_rotation(features, float(rotate), seed)


def slight_rotation(features: int, angle: float, seed: int) -> Tensor:
    """A random rotation by angles with about this root mean square, in double precision on the CPU."""
    if angle == 0 or features == 1:
        return torch.eye(features, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(features, features, generator=generator, dtype=torch.float64, device="cpu")
    skew = normal - normal.mT
    # Each of its planes has its angle twice in the norm, once with either sign.
    skew *= angle * math.sqrt(2 * (features // 2)) / skew.norm()
    # Cayley's map, which for slight rotations is the exponential at a fraction of its cost.
    eye = torch.eye(features, dtype=torch.float64, device="cpu")
    return torch.linalg.solve(eye - skew / 2, eye + skew / 2)


def random_rotation(features: int, seed: int) -> Tensor:
    """A rotation drawn uniformly, of shape ``(features, features)``, in double precision on the CPU."""
    normal = torch.randn(
        features,
        features,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
        device="cpu",
    )
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal().sign()  # without which q is not uniform
    q[:, 0] *= torch.linalg.det(q).sign()
    return q


class MatrixExponential(LinearMap):
    r"""The exponential of a matrix.

    .. math:: y = e^A x, \quad x = e^{-A} y, \quad \log\det e^A = \mathrm{tr} A.

    :math:`A` is any matrix, learned or the output of a network of the context. Volumes and
    orientation change smoothly and no constraint is needed, but scales grow as :math:`e^{|A|}`.
    Both directions cost one matrix product, after one exponential per call. It starts at the
    identity.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive.

    Reference:
        Xiao, Liu, "Generative flows with matrix exponential", 2020,
        https://arxiv.org/abs/2007.09651

    Example:
        >>> t = MatrixExponential(2)
        >>> t.log_abs_det_jacobian(torch.zeros(2), t(torch.zeros(2))).detach()
        tensor(0.)
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        self.start(network, raw=torch.zeros(self.features, self.features))

    def _log_det(self, raw: Tensor) -> Tensor:
        return raw.diagonal(dim1=-2, dim2=-1).sum(-1)

    def _multiply(self, raw: Tensor, x: Tensor) -> Tensor:
        return multiply(torch.matrix_exp(raw), x)

    def _solve(self, raw: Tensor, y: Tensor) -> Tensor:
        return multiply(torch.matrix_exp(-raw), y)

    def _solve_transposed(self, raw: Tensor, score: Tensor) -> Tensor:
        return multiply(torch.matrix_exp(-raw).mT, score)
