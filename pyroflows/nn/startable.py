"""Networks that can start at given outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["StartAt", "Startable", "temper"]


class Startable(nn.Module, ABC):
    """A network that can be made constant, and that broadcasts its input against its context."""

    @abstractmethod
    def start_at(self, values: Tensor) -> None:
        """Makes the network constant.

        Args:
            values: What it gives from then on, a tensor of shape ``(outputs,)``.
        """

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Evaluates the network.

        Args:
            x: Input of shape ``(*, inputs, *positions)``, without positions where it is a vector.
            context: Context of shape ``(*, context, *positions)``, broadcast against ``x``.

        Returns:
            Output of shape ``(*, outputs, *positions)``.
        """


class StartAt(Startable):
    r"""Any module, followed by an affine map that makes it constant at first.

    .. math:: y = a \odot h(x) + b.

    The scales :math:`a` start at zero, and the offsets :math:`b` at the given outputs. The module
    itself sees one batch dimension where its inputs have positions, because convolutions take no
    more; it is called as ``module(x)``, or as ``module(x, context)`` with both of one batch shape.

    Args:
        module: The module.
        outputs: How many outputs, or channels of outputs, it has.
        positions: How many dimensions follow that of the channels.

    Example:
        >>> network = StartAt(nn.Linear(3, 2), outputs=2)
        >>> network.start_at(torch.ones(2))
        >>> network(torch.randn(5, 3)).unique().tolist()
        [1.0]
    """

    def __init__(self, module: nn.Module, outputs: int, positions: int = 0) -> None:
        super().__init__()
        self.module = module
        self.positions = positions
        shape = (outputs, *[1] * positions)
        self.scale = nn.Parameter(torch.zeros(shape))
        self.offset = nn.Parameter(torch.zeros(shape))

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        self.scale.zero_()
        self.offset.copy_(values.reshape(self.offset.shape))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        event = 1 + self.positions
        batch = x.shape[: x.dim() - event]
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[: context.dim() - event])
        given = [self._lay_out(part, batch) for part in (x, context) if part is not None]
        out = self.module(*given)
        if self.positions:
            out = out.reshape(*batch, *out.shape[1:])
        return torch.addcmul(self.offset, self.scale, out)

    def _lay_out(self, part: Tensor, batch: torch.Size) -> Tensor:
        """A tensor with the batch that all share, in one dimension where there are positions."""
        event = part.shape[part.dim() - 1 - self.positions :]
        part = part.expand(*batch, *event)
        return part.reshape(batch.numel(), *event) if self.positions else part


def temper(network: nn.Module, share: float, start: Tensor) -> None:
    """Makes the outputs of a network count by a share, from where it starts.

    Args:
        network: A network that scales its outputs; any other stays as it is.
        share: Factor of the scale.
        start: What the network gives at the start, as for ``start_at``.
    """
    scale = getattr(network, "output_scale", 1.0)
    if scale < 1:  # a network without hidden layers has none to temper
        network.output_scale = scale * share  # type: ignore[assignment]
        network.start_at(start)  # type: ignore[operator]
