"""Linear maps and permutations."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from .._checks import check_shape, check_size, check_tensor
from ..nn.made import check_order
from ..nn.network import Network, mlp
from .base import Transform
from .parametric import Parametric

__all__ = [
    "Householder",
    "LULinear",
    "LowerTriangularAffine",
    "MatrixExponential",
    "Orthogonal",
    "Permute",
    "Reverse",
]


def multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """The product of one matrix, or one per point, with vectors in the last dimension."""
    return x @ matrix.mT if matrix.dim() == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)


def solve_triangle(
    matrix: Tensor,
    y: Tensor,
    upper: bool = False,
    transposed: bool = False,
    unit_diagonal: bool = False,
) -> Tensor:
    """Solves ``matrix x = y``, or with the transposed matrix, for one triangular matrix or one per point."""
    if transposed:
        matrix, upper = matrix.mT, not upper
    if matrix.dim() == 2:
        columns = y.reshape(-1, y.shape[-1]).mT
        return torch.linalg.solve_triangular(
            matrix, columns, upper=upper, unitriangular=unit_diagonal
        ).mT.reshape(y.shape)
    return torch.linalg.solve_triangular(
        matrix, y.unsqueeze(-1), upper=upper, unitriangular=unit_diagonal
    ).squeeze(-1)


def composed(inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The offset and the matrix of two affine maps one after the other, each given by its own."""
    (loc, matrix), (outer_loc, outer_matrix) = inner, outer
    return outer_loc + outer_matrix @ loc, outer_matrix @ matrix


class LowerTriangularAffine(Parametric):
    r"""Affine map with a lower-triangular matrix, :math:`y = \mu + L x`, :math:`L_{ii} = e^{d_i} > 0`.

    From a standard normal base it gives every multivariate normal; a guide uses it to whiten. It starts at the
    identity. With a context, :math:`\mu`, :math:`d` and the rest of :math:`L` are the output of a network.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for vectors.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> t = LowerTriangularAffine(2)
        >>> t.set(loc=torch.ones(2), scale_tril=torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> t(torch.ones(2)).detach()
        tensor([3., 3.])
    """

    vectors_only = True
    loc: Parameter
    log_diag: Parameter
    lower: Parameter

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
        self.start(
            network,
            loc=torch.zeros(n),
            log_diag=torch.zeros(n),
            lower=torch.zeros(n, n),
        )

    @torch.no_grad()
    def set(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Sets the map to ``y = loc + scale_tril x``.

        Args:
            loc: Tensor of shape ``(features,)``.
            scale_tril: Lower-triangular tensor of shape ``(features, features)`` with a positive diagonal.

        Raises:
            TypeError: If an argument is not a floating-point tensor.
            ValueError: If the map has a context, or if an argument is not as described.
        """
        if self.context_features is not None:
            raise ValueError(
                "Expected a LowerTriangularAffine without context; this one is set by its network."
            )
        n = self.features
        for name, given, dim in (("loc", loc, 1), ("scale_tril", scale_tril, 2)):
            if check_tensor(name, given, (n,) * dim).dim() != dim:
                raise ValueError(
                    f"Expected {name} of shape {(n,) * dim}; got {tuple(given.shape)}."
                )
        diagonal = scale_tril.diagonal()
        if not bool((diagonal > 0).all()):
            raise ValueError(
                f"Expected scale_tril with a positive diagonal; got {diagonal.tolist()}."
            )
        if bool(scale_tril.triu(1).any()):
            raise ValueError(
                "Expected scale_tril to be lower-triangular; got one with entries above the diagonal."
            )
        self.loc.copy_(loc)
        self.log_diag.copy_(diagonal.log())
        self.lower.copy_(scale_tril.tril(-1))

    @torch.no_grad()
    def loc_and_scale_tril(self) -> tuple[Tensor, Tensor]:
        """The offset, of shape ``(features,)``, and the matrix, of shape ``(features, features)``, without gradient.

        Raises:
            ValueError: If the map has a context.
        """
        if self.context_features is not None:
            raise ValueError(
                "Expected a LowerTriangularAffine without context; this one is set by its network."
            )
        loc, _, matrix = self._loc_matrix(None)
        return loc.clone(), matrix

    def _loc_matrix(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        loc, log_diag, lower = self.tables_for(context)
        return loc, log_diag, lower.tril(-1) + torch.diag_embed(log_diag.exp())

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        loc, log_diag, matrix = self._loc_matrix(context)
        y = multiply(matrix, x) + loc
        return y, log_diag.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        loc, log_diag, matrix = self._loc_matrix(context)
        x = solve_triangle(matrix, y - loc)
        return x, -log_diag.sum(-1).expand(x.shape[:-1])

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x, context)
        with torch.no_grad():
            # J = L, so the new score solves L' s = score.
            pushed = solve_triangle(
                self._loc_matrix(context)[2], score.expand(y.shape), transposed=True
            )
        return y, log_det, pushed


def inverse_permutation(permutation: list[int]) -> list[int]:
    """The inverse of a permutation of ``0 .. n - 1``."""
    return sorted(range(len(permutation)), key=permutation.__getitem__)


class Permute(Transform):
    r"""A fixed permutation, :math:`y_i = x_{\pi(i)}`, of the entries of a vector or the channels of an image or series.

    It is saved and moved with the module.

    Args:
        permutation: The permutation :math:`\pi` as a sequence of ``0 .. n - 1``, or the number :math:`n` for a random one.
        positions: Shape of what each entry holds: ``()`` for vectors, ``(height, width)`` for the channels of an image.
        seed: Seed of the random one. It depends on nothing else, so that a flow made again, to load saved parameters,
            has the permutation that the parameters were trained with.

    Raises:
        TypeError: If an entry is not an integer.
        ValueError: If the sequence is no permutation.

    Example:
        >>> Permute([2, 0, 1])(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 1., 2.])
    """

    exempt_laws: ClassVar[Mapping[str, str]] = {"starts_at_identity": "it permutes by intention"}
    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(
        self,
        permutation: int | Sequence[int] | Tensor,
        *,
        positions: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        chosen = _check_permutation(permutation, check_size("seed", seed, least=0))
        super().__init__((len(chosen), *check_shape("positions", positions)))
        self._dim = -len(self.event_shape)
        self.register_buffer("permutation", torch.tensor(chosen))
        self.register_buffer("inverse_permutation", torch.tensor(inverse_permutation(chosen)))

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._gather(x, self.permutation), self._no_log_det(x)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._gather(y, self.inverse_permutation), self._no_log_det(y)

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, self._gather(score, self.permutation)

    def _gather(self, x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(self._dim, index)

    def _no_log_det(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[: self._dim])


def _check_permutation(permutation: Any, seed: int) -> list[int]:
    if isinstance(permutation, str):
        raise TypeError(
            f"Expected permutation to be a sequence of integers or their number; got {permutation!r}."
        )
    if isinstance(permutation, Tensor):
        permutation = permutation.tolist()
    if not isinstance(permutation, Sequence):
        generator = torch.Generator().manual_seed(seed)
        size = check_size("features", permutation)
        return torch.randperm(size, generator=generator, device="cpu").tolist()
    check_size("features", len(permutation))
    return check_order(permutation, len(permutation), "permutation")


class Reverse(Permute):
    r"""Reverses the order of the entries or channels, :math:`y_i = x_{n+1-i}`.

    Args:
        features: Entries of a vector, or the shape of an event, whose first dimension is reversed.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive.

    Example:
        >>> Reverse(3)(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 2., 1.])
    """

    def __init__(self, features: int | Sequence[int]) -> None:
        channels, *positions = check_shape("features", features, least=1)
        super().__init__(list(reversed(range(channels))), positions=positions)


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

    :math:`P` is a fixed permutation, :math:`L` lower-triangular with a unit diagonal, :math:`U` upper-triangular with the
    diagonal :math:`\pm e^{d_i}` of fixed signs, so that :math:`\log|\det W| = \sum_i d_i`. One table of raw numbers holds
    them as LAPACK does: :math:`L` below the diagonal, :math:`d` on it, :math:`U` above, and :math:`b` in one more row. It
    starts at the identity, with ``rotate`` at a random rotation. With a context, the table is the output of a network.

    Where entries are independent, however far from normal, the identity between two layers is a saddle point: no gradient
    tells a turn from its opposite. To start a little turned is to start beside it.

    Sampling multiplies by the matrix, or by its triangles one after the other where there are fewer points than entries, and
    scoring solves with the triangles.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for vectors.
        bias: Whether there is an offset :math:`b`.
        rotate: ``True`` to start at a random rotation, as in Glow; a number between :math:`-\pi` and :math:`\pi` to start at
            one by about that angle, in radians, or with a minus at its inverse.
        seed: Seed of that rotation, which depends on nothing else.
        network: Factory of the network that reads the context.

    Raises:
        TypeError: If ``rotate`` is neither a boolean nor a number.
        ValueError: If a size is not positive, ``seed`` is negative or ``rotate`` is no angle.

    Reference:
        Kingma, Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018, https://arxiv.org/abs/1807.03039

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
        diagonal = self.signs * raw.diagonal(dim1=-2, dim2=-1).exp()
        return raw.tril(-1), raw.triu(1) + torch.diag_embed(diagonal)

    def _bias(self, raw: Tensor) -> Tensor | None:
        return raw[..., -1, :] if raw.shape[-2] > raw.shape[-1] else None

    def _log_det(self, raw: Tensor) -> Tensor:
        return raw.diagonal(dim1=-2, dim2=-1).sum(-1)

    def _multiply(self, raw: Tensor, x: Tensor) -> Tensor:
        lower, upper = self._triangles(raw)
        if raw.dim() == 2 and x[..., 0].numel() >= x.shape[-1]:
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


class Orthogonal(LinearMap):
    r"""A rotation by Cayley's map, :math:`y = Q x` with :math:`Q = (I - A)^{-1} (I + A)`.

    :math:`A = R - R^\top` is skew-symmetric, :math:`R` strictly lower-triangular and learned or the output of a network of
    the context. Every rotation without the eigenvalue -1 is such a :math:`Q`, and the others are limits of them. Volumes
    are kept. Both directions cost one matrix product, after one solve per call. It starts at the identity.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for vectors.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive.

    Reference:
        Helfrich, Willmott, Ye, "Orthogonal recurrent neural networks with scaled Cayley transform", 2018,
        https://arxiv.org/abs/1707.09520

    Example:
        >>> t = Orthogonal(2)
        >>> _ = torch.nn.init.ones_(t.raw)
        >>> t(torch.tensor([1.0, 0.0])).detach()  # a quarter turn
        tensor([0., 1.])
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

    def _matrix(self, raw: Tensor) -> Tensor:
        lower = raw.tril(-1)
        skew = lower - lower.mT
        eye = torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)
        # I - A has no singular value below one, so there is no error to check for, which would wait for the device.
        return torch.linalg.solve_ex(eye - skew, eye + skew)[0]

    def _multiply(self, raw: Tensor, x: Tensor) -> Tensor:
        return multiply(self._matrix(raw), x)

    def _solve(self, raw: Tensor, y: Tensor) -> Tensor:
        return multiply(self._matrix(raw).mT, y)

    def _solve_transposed(self, raw: Tensor, score: Tensor) -> Tensor:
        return self._multiply(raw, score)


class Householder(LinearMap):
    r"""A product of reflections, :math:`y = H_1 H_2 \cdots H_K x` with :math:`H_k = I - 2 v_k v_k^\top / |v_k|^2`.

    Its matrix is orthogonal, so volumes are kept, and its inverse is the same product in the opposite order. The product is
    never formed: with unit vectors as columns of :math:`V` it is :math:`I - V S^{-1} V^\top`, where :math:`S` has the
    entries of :math:`V^\top V` above its diagonal and one half on it. Both directions cost :math:`2DK` operations per point.
    An even number of reflections is a rotation, and ``features`` of them give every rotation. It starts at the identity:
    reflections 1 and 2 are equal, 3 and 4, and so on.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``; with them the vectors are the output of a network.
        context_shape: Shape of the context, of which ``context_features`` is the short form for vectors.
        reflections: Even number :math:`K` of reflections; by default enough for every rotation.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive or ``reflections`` is odd.

    Reference:
        Tomczak, Welling, "Improving variational auto-encoders using Householder flow", 2016,
        https://arxiv.org/abs/1611.09630

    Example:
        >>> Householder(3)(torch.tensor([1.0, 2.0, 3.0])).detach()
        tensor([1., 2., 3.])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        reflections: int | None = None,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        count = (
            2 * max(self.features // 2, 1)
            if reflections is None
            else check_size("reflections", reflections)
        )
        if count % 2:
            raise ValueError(
                f"Expected reflections to be even, so that they can start as equal pairs; got {count}."
            )
        # Along the axes two equal reflections undo each other without a rounding.
        index = torch.arange(count, device="cpu") // 2 % self.features
        self.start(network, raw=torch.eye(self.features)[index.tolist()])

    def _multiply(self, raw: Tensor, x: Tensor) -> Tensor:
        return reflect(raw, x)

    def _solve(self, raw: Tensor, y: Tensor) -> Tensor:
        return reflect(raw, y, transposed=True)

    def _solve_transposed(self, raw: Tensor, score: Tensor) -> Tensor:
        return self._multiply(raw, score)


def reflect(vectors: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """The product of reflections along ``vectors``, the last applied first, or its transpose, times ``x``."""
    units, mixing = accumulate(vectors)
    weights = solve_triangle(mixing, multiply(units, x), upper=True, transposed=transposed)
    return x - multiply(units.mT, weights)


def accumulate(vectors: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factors of a product of reflections, :math:`H_1 \cdots H_K = I - V S^{-1} V^\top`.

    Args:
        vectors: Tensor of shape ``(*, K, features)``.

    Returns:
        :math:`V^\top` of shape ``(*, K, features)`` and the upper-triangular :math:`S` of shape ``(*, K, K)``.

    Reference:
        Joffrain, Low, Quintana-Ortí, van de Geijn, van Zee, "Accumulating Householder transformations, revisited", 2006,
        https://doi.org/10.1145/1141885.1141886
    """
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    units = vectors / norm.clamp(min=torch.finfo(vectors.dtype).tiny)
    half = torch.full_like(units[..., 0], 0.5)
    return units, (units @ units.mT).triu(1) + torch.diag_embed(half)


class MatrixExponential(LinearMap):
    r"""The exponential of a matrix.

    .. math:: y = e^A x, \quad x = e^{-A} y, \quad \log\det e^A = \mathrm{tr} A.

    :math:`A` is any matrix, learned or the output of a network of the context. Volumes and orientation change smoothly and
    no constraint is needed, but scales grow as :math:`e^{|A|}`. Both directions cost one matrix product, after one
    exponential per call. It starts at the identity.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for vectors.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive.

    Reference:
        Xiao, Liu, "Generative flows with matrix exponential", 2020, https://arxiv.org/abs/2007.09651

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
