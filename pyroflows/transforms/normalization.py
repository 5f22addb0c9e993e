"""Layers that keep the entries of a deep flow near zero mean and unit variance, from the statistics of data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_positive
from .._compat import transforming
from ..nn.network import Network, mlp
from ..univariate import Affine
from .base import Transform, channels_last
from .elementwise import Elementwise

__all__ = ["ActNorm", "BatchNorm"]


class _Normalization(Elementwise):
    """An elementwise affine map, of any scale, with one scale and shift per channel."""

    univariate: Affine

    def __init__(
        self,
        features: int | Sequence[int],
        context_features: int | None,
        context_shape: Sequence[int] | None,
        network: Network,
    ) -> None:
        super().__init__(
            Affine("exp"),
            features,
            context_features,
            context_shape=context_shape,
            per_channel=True,
            network=network,
        )

    def extra_repr(self) -> str:
        return Transform.extra_repr(self)


class ActNorm(_Normalization):
    r"""Scale and shift of each entry, :math:`y = e^s x + b`, that start from data.

    The first batch of data that is scored in training mode sets :math:`b` to its mean and :math:`s`
    to the logarithm of its standard deviation, so that :math:`x` then has zero mean and unit
    variance, entry by entry; an entry that is constant is only centred. From then on both are
    parameters like any other. That they are set is saved, by ``state_dict`` as by pickle, and
    happens once. It does not happen in evaluation mode, with a batch of fewer than two points, by
    drawing samples, under ``vmap``, in a compiled graph, or where training has moved the parameters
    already. Before, the map is the identity. With a context, :math:`s` and :math:`b` are the output
    of a network, which starts out constant.

    Args:
        features: Entries of a vector, or the shape of an event, which is normalised channel by
            channel.
        context_features: Entries of the context, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive.

    Reference:
        Kingma, Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions", 2018,
        https://arxiv.org/abs/1807.03039

    Example:
        >>> t = ActNorm(1)
        >>> t.inv(torch.tensor([[8.0], [12.0]])).detach()
        tensor([[-1.],
                [ 1.]])
        >>> t(torch.tensor([0.0])).detach()
        tensor([10.])
    """

    initialized: Tensor

    def __init__(
        self,
        features: int | Sequence[int],
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape, network)
        self.register_buffer("initialized", torch.tensor(False))
        self._waiting = True  # the buffer's opposite, to be asked without waiting for the device

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.initialized.is_meta:
            self._waiting = not bool(self.initialized)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self._waiting and self.training and not transforming() and not y.is_meta:
            self._initialize(y.detach(), context)
        return super().inverse_and_log_det(y, context)

    @torch.no_grad()
    def _initialize(self, y: Tensor, context: Tensor | None) -> None:
        data = channels_last(y, self.event_shape)
        lent = not all(
            isinstance(parameter, nn.Parameter) for parameter in self.parameters()
        )  # by a functional call
        if (
            y.dim() == len(self.event_shape)
            or y.shape[: y.dim() - len(self.event_shape)].numel() < 2
            or lent
        ):
            return
        if not bool(self.parameters_for(context).any()):
            table = torch.stack(_log_spread_and_mean(data))
            if self.context_shape is None:
                self.raw.copy_(table.reshape(self.raw.shape))
            else:
                self.conditioner.start_at(table.flatten())
        self.initialized.fill_(True)
        self._waiting = False

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self.entries(x)
        y, log_scale = self.univariate.forward_and_log_det(x, self._raw(context))
        pushed = score * self.event(log_scale.neg().exp())
        return self.event(y), log_scale.sum(-1), pushed.detach()

    def pull_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = self.entries(y)
        x, log_slope = self.univariate.inverse_and_log_det(y, self._raw(context))
        pulled = score * self.event(log_slope.neg().exp())
        return self.event(x), log_slope.sum(-1), pulled.detach()


def _log_spread_and_mean(data: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the standard deviation and mean of each column; 0 for what data cannot tell."""
    # In units of the largest entry, whose square may overflow.
    size = data.abs().amax(0)
    unit = torch.where((size > 0) & size.isfinite(), size, 1.0)
    variance, mean = torch.var_mean(data / unit, 0, correction=0)
    known = mean.isfinite() & variance.isfinite()
    # The deviations of a constant are roundings of its mean.
    varies = known & (variance.sqrt() > 8 * torch.finfo(data.dtype).eps)
    log_spread = torch.where(
        varies, 0.5 * torch.where(varies, variance, 1.0).log() + unit.log(), 0.0
    )
    return log_spread, torch.where(known, mean * unit, 0.0)


class BatchNorm(_Normalization):
    r"""Normalisation by running statistics, then scale and shift.

    .. math:: y = e^\gamma \frac{x - m}{\sqrt{v + \epsilon}} + \beta.

    In training mode each batch of at least two points that is mapped forward, by
    :meth:`forward_and_log_det`, first moves the running mean :math:`m` and variance :math:`v`
    towards its own: the :math:`k`-th batch by the larger of ``momentum`` and :math:`1 / k`, so that
    the first one sets them and what they start from leaves no bias. No inverse moves them, nor
    anything in evaluation mode, nor under ``vmap``. The map itself always uses the running
    statistics, as constants, so that it is invertible and its density exact in both modes. Both
    directions are fast. Before the first batch it is the identity.

    To normalise data in a density flow, use ``BatchNorm(features).inv``: data pass through its
    forward when they are scored, and samples come back by its inverse.

    Args:
        features: Entries of a vector, or the shape of an event, which is normalised channel by
            channel.
        context_features: Entries of the context; with them :math:`\gamma` and :math:`\beta` are the
            output of a network.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        momentum: Weight of a new batch in the running statistics, above 0 and at most 1.
        epsilon: Positive number :math:`\epsilon` that keeps the root away from zero.
        network: Factory of the network that reads the context.

    Raises:
        ValueError: If a size is not positive, or if ``momentum`` or ``epsilon`` is out of its
            range.

    Reference:
        Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2016,
        https://arxiv.org/abs/1605.08803

    Example:
        >>> t = BatchNorm(1).inv
        >>> x, log_det = t.inverse_and_log_det(torch.tensor([[8.0], [12.0], [10.0]]))
        >>> print(*(f"{value:.3f}" for value in x.flatten()))
        -1.000 1.000 0.000
        >>> t.eval()(torch.tensor([0.0])).detach()
        tensor([10.])
    """

    repeatable = False
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor

    def __init__(
        self,
        features: int | Sequence[int],
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        momentum: float = 0.1,
        epsilon: float = 1e-5,
        network: Network = mlp(),
    ) -> None:
        super().__init__(features, context_features, context_shape, network)
        self.momentum = check_positive("momentum", momentum)
        if self.momentum > 1:
            raise ValueError(f"Expected momentum <= 1; got {momentum}.")
        self.epsilon = check_positive("epsilon", epsilon)
        channels = self.event_shape[:1].numel()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("batches", torch.tensor(0))

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        if x.shape[: x.dim() - len(self.event_shape)].numel() < 2:
            return
        data = channels_last(x, self.event_shape)
        self.batches.add_(1)
        weight = self.batches.to(self.running_mean.dtype).reciprocal().clamp(min=self.momentum)
        variance, mean = torch.var_mean(data.to(self.running_mean.dtype), 0)
        known = variance.isfinite()  # squares may overflow
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(torch.where(known, running.lerp(new, weight), running))

    def _normalization(self) -> tuple[Tensor, Tensor]:
        """The running mean and the logarithm of the running standard deviation, as they are now, for each entry."""
        epsilon = torch.where(
            self.batches > 0, self.epsilon, 0.0
        )  # without data, exactly the identity
        variance = self.running_var + epsilon.to(self.running_var.dtype)
        return self._per_entry(self.running_mean.clone()), self._per_entry(0.5 * variance.log())

    def _per_entry(self, per_channel: Tensor) -> Tensor:
        """What belongs to channels, for each of their entries, of the shape of the event."""
        positions = self.event_shape[1:]
        if not positions:
            return per_channel
        return per_channel.reshape(-1, *[1] * len(positions)).expand(self.event_shape)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.training and (torch.compiler.is_compiling() or not transforming()):
            self._update(x.detach())
        mean, log_spread = self._normalization()
        y, log_det = super().forward_and_log_det((x - mean) * log_spread.neg().exp(), context)
        return y, log_det - log_spread.sum()

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        mean, log_spread = self._normalization()
        x, log_det = super().inverse_and_log_det(y, context)
        return torch.addcmul(mean, x, log_spread.exp()), log_det + log_spread.sum()

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.forward_and_log_det(x, context)
        return y, log_det, (score * self._log_scale(context).neg().exp()).expand(y.shape).detach()

    def pull_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, log_det = self.inverse_and_log_det(y, context)
        return x, log_det, (score * self._log_scale(context).exp()).expand(x.shape).detach()

    def _log_scale(self, context: Tensor | None) -> Tensor:
        """The logarithm of the slope of each entry."""
        learned = self.univariate.log_scale(self._raw(context).select(-2, 0))
        return self.event(learned) - self._normalization()[1]
