"""A flow followed by an affine map that carries the location and scale of a posterior."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from .._compat import module_name
from ..flows import Flow
from ..transforms import LowerTriangularAffine, Transform
from ..transforms.low_rank import TRIANGULAR, LowRankAffine, LowRankRoot
from ..transforms.roots import Root, triangle

__all__ = ["WhitenedFlow"]


class WhitenedFlow(Flow):
    r"""A flow :math:`f` and a whitening map :math:`(\mu, L)` after it: :math:`z = \mu + L\, f(x)`.

    The matrix :math:`L` is lower-triangular; above 256 features it is a diagonal matrix times one
    that differs from the identity by low rank.

    The flow keeps all its options: its transform is taken as it is, with its own way to train, and
    its base and name are those of the whole.

    Args:
        flow: A flow over the whole space without context, or a transform, whose base is then the
            standard normal.

    Raises:
        TypeError: If ``flow`` is neither.

    Example:
        >>> import torch, pyroflows as pf
        >>> flow = WhitenedFlow(pf.RealNVP(2, reversible=True))
        >>> flow.whiten(torch.tensor([1.0, 2.0]), torch.eye(2))
        >>> flow.body.reversible, flow.whitening.loc.tolist()
        (True, [1.0, 2.0])
    """

    def __init__(self, flow: Flow | Transform) -> None:
        made = flow if isinstance(flow, Flow) else Flow([flow])
        features = made.event_shape[0]
        many = features > TRIANGULAR
        whitening = LowRankAffine(features) if many else LowerTriangularAffine(features)
        super().__init__([made.transform, whitening], made.given_base, name=module_name(made))

    @property
    def body(self) -> Transform:
        """The transform before the whitening map."""
        return cast("Transform", self.transform.layers[0])

    @property
    def whitening(self) -> LowerTriangularAffine | LowRankAffine:
        """The affine map that comes last."""
        return cast("LowerTriangularAffine | LowRankAffine", self.transform.layers[1])

    def whiten(self, loc: Tensor, scale_tril: Root) -> None:
        """Sets the whitening map.

        Args:
            loc: Tensor of shape ``(features,)``.
            scale_tril: Lower-triangular tensor of shape ``(features, features)`` with a positive
                diagonal, or a root of low rank; above 256 features the principal factors of its
                covariance are kept.

        Raises:
            ValueError: If the diagonal is not positive.
        """
        whitening, root = self.whitening, scale_tril
        if isinstance(whitening, LowRankAffine):
            whitening.set(loc, LowRankRoot.of_factor(root) if isinstance(root, Tensor) else root)
        else:
            whitening.set(loc, triangle(root))
