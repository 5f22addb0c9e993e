"""Linear maps and permutations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .._checks import check_size, check_tensor
from ..nn import MLP
from .base import Transform

__all__ = ["LowerTriangularAffine", "Permute", "Reverse"]


class LowerTriangularAffine(Transform):
    r"""Affine map with a lower-triangular matrix, :math:`y = \mu + L x`, :math:`L_{ii} = e^{d_i} > 0`.

    From a standard normal base it gives every multivariate normal; a guide uses it to whiten. It starts at the
    identity. With a context, :math:`\mu`, :math:`d` and the rest of :math:`L` are the output of a network.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context, or ``None``.
        hidden_features: Widths of the network that reads the context.
        activation: Its activation.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> t = LowerTriangularAffine(2)
        >>> t.set(loc=torch.ones(2), scale_tril=torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> t(torch.ones(2)).detach()
        tensor([3., 3.])
    """

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        hidden_features: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(features, context_features)
        if context_features is None:
            self.loc = nn.Parameter(torch.zeros(features))
            self.log_diag = nn.Parameter(torch.zeros(features))
            self.lower = nn.Parameter(torch.zeros(features, features))
        else:
            entries = features * (features + 2)
            self.conditioner = MLP(0, entries, hidden_features, context_features, activation)
            self.conditioner.start_at(torch.zeros(entries))

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
            raise ValueError("Expected a LowerTriangularAffine without context; this one is set by its network.")
        n = self.event_shape[0]
        for name, given, dim in (("loc", loc, 1), ("scale_tril", scale_tril, 2)):
            if check_tensor(name, given, (n,) * dim).dim() != dim:
                raise ValueError(f"Expected {name} of shape {(n,) * dim}; got {tuple(given.shape)}.")
        diagonal = scale_tril.diagonal()
        if not bool((diagonal > 0).all()):
            raise ValueError(f"Expected scale_tril with a positive diagonal; got {diagonal.tolist()}.")
        if bool(scale_tril.triu(1).any()):
            raise ValueError("Expected scale_tril to be lower-triangular; got one with entries above the diagonal.")
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
            raise ValueError("Expected a LowerTriangularAffine without context; this one is set by its network.")
        loc, _, matrix = self._loc_matrix(None)
        return loc.clone(), matrix

    def _loc_matrix(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.context_features is None:
            loc, log_diag, lower = self.loc, self.log_diag, self.lower
        else:
            n = self.event_shape[0]
            loc, log_diag, lower = self.conditioner(None, context).split([n, n, n * n], -1)
            lower = lower.unflatten(-1, (n, n))
        return loc, log_diag, lower.tril(-1) + torch.diag_embed(log_diag.exp())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, log_diag, matrix = self._loc_matrix(context)
        y = (x @ matrix.mT if matrix.dim() == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)) + loc
        return y, log_diag.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, log_diag, matrix = self._loc_matrix(context)
        x = _solve_lower(matrix, y - loc)
        return x, -log_diag.sum(-1).expand(x.shape[:-1])

    def push_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x, context)
        with torch.no_grad():
            matrix = self._loc_matrix(context)[2]
            # J = L, so the new score solves L' s = score; as rows, s L = score.
            if matrix.dim() == 2:
                rows = torch.linalg.solve_triangular(matrix, score.reshape(-1, matrix.shape[-1]), upper=False, left=False)
                pushed = rows.reshape(score.shape)
            else:
                score = score.expand(y.shape).unsqueeze(-1)
                pushed = torch.linalg.solve_triangular(matrix.mT, score, upper=True).squeeze(-1)
        return y, log_det, pushed


def _solve_lower(matrix: Tensor, value: Tensor) -> Tensor:
    if matrix.dim() == 2:
        columns = value.reshape(-1, matrix.shape[-1]).mT
        return torch.linalg.solve_triangular(matrix, columns, upper=False).mT.reshape(value.shape)
    return torch.linalg.solve_triangular(matrix, value.unsqueeze(-1), upper=False).squeeze(-1)


def inverse_permutation(permutation: list[int]) -> list[int]:
    """The inverse of a permutation of ``0 .. n - 1``."""
    return sorted(range(len(permutation)), key=permutation.__getitem__)


class Permute(Transform):
    r"""A fixed permutation of the entries, :math:`y_i = x_{\pi(i)}`; it is saved and moved with the module.

    Args:
        permutation: The permutation :math:`\pi` as a sequence of ``0 .. features - 1``, or the number of features for a
            random one.
        seed: Seed of the random one. It depends on nothing else, so that a flow made again, to load saved parameters,
            has the permutation that the parameters were trained with.

    Raises:
        TypeError: If an entry is not an integer.
        ValueError: If the sequence is no permutation.

    Example:
        >>> Permute([2, 0, 1])(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 1., 2.])
    """

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, permutation: int | Sequence[int] | Tensor, seed: int = 0) -> None:
        check_size("seed", seed, least=0)
        if isinstance(permutation, str):
            raise TypeError(f"Expected permutation to be a sequence of integers or their number; got {permutation!r}.")
        if isinstance(permutation, (Sequence, Tensor)):
            given = permutation.tolist() if isinstance(permutation, Tensor) and permutation.dim() else permutation
            order = [check_size("permutation", i, least=0) for i in given]
            if sorted(order) != list(range(len(order))):
                raise ValueError(f"Expected permutation to hold each of 0 .. {len(order) - 1} once; got {order}.")
        else:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(check_size("features", permutation), generator=generator, device="cpu").tolist()
        super().__init__(len(order))
        self.register_buffer("permutation", torch.tensor(order))
        self.register_buffer("inverse_permutation", torch.tensor(inverse_permutation(order)))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.permutation), x.new_zeros(()).expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y.index_select(-1, self.inverse_permutation), y.new_zeros(()).expand(y.shape[:-1])

    def push_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x)
        return y, log_det, score.index_select(-1, self.permutation)


class Reverse(Permute):
    r"""Reverses the order of the entries, :math:`y_i = x_{D+1-i}`.

    Args:
        features: Entries of the vector.

    Example:
        >>> Reverse(3)(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 2., 1.])
    """

    def __init__(self, features: int) -> None:
        super().__init__(list(reversed(range(check_size("features", features)))))
