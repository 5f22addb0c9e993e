"""Bases for flows whose samples a normal base does not suit: heavy tails, or several modes."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .._checks import check_batch_shape, check_positive, check_size
from .._spec import Recorded
from ..univariate.base import soft_clip

__all__ = ["NormalMixture", "NormalMixtureBase", "StudentTBase", "mixture_base", "student_t_base"]


def student_t_base(features: int, df: float | Tensor = 5.0) -> dist.Independent:
    r"""A vector of independent Student-t variables, as a base of heavy tails.

    Args:
        features: Entries of the vector.
        df: Degrees of freedom :math:`\nu`, a number or a tensor of shape ``(features,)``; tails fall like
            :math:`|x|^{-\nu}`.

    Returns:
        A distribution of event shape ``(features,)``.

    Raises:
        TypeError: If ``df`` is neither a number nor a floating-point tensor.
        ValueError: If ``features`` or a degree is not positive, or if the shape of ``df`` is another.

    Reference:
        Jaini, Kobyzev, Yu, Brubaker, "Tails of Lipschitz triangular flows", 2020, https://arxiv.org/abs/1907.04481

    Example:
        >>> student_t_base(3, df=2.0).sample((5,)).shape
        torch.Size([5, 3])
    """
    check_size("features", features)
    if not isinstance(df, Tensor):
        df = torch.tensor(check_positive("df", df))
    elif not df.is_floating_point():
        raise TypeError(f"Expected df of a floating-point dtype; got {df.dtype}.")
    elif df.shape not in ((), (features,)):
        raise ValueError(f"Expected df of shape ({features},); got {tuple(df.shape)}.")
    elif not df.is_meta and not bool((df > 0).all()):
        raise ValueError("Expected df to be positive; got a tensor with other values.")
    return _student_t(df.expand(features))


def _student_t(df: Tensor) -> dist.Independent:
    return dist.StudentT(
        df, torch.zeros_like(df), torch.ones_like(df), validate_args=False
    ).to_event(1)


class NormalMixture(dist.MixtureSameFamily):
    r"""A mixture of normals with diagonal covariances, with reparametrised samples.

    .. math:: p(x) = \sum_{k=1}^K \pi_k \prod_i \mathcal N(x_i; \mu_{ki}, \sigma_{ki}^2).

    Gradients of a sample are implicit: with :math:`F_i` the distribution function of :math:`x_i` given the entries before
    it, itself that of a mixture, :math:`F_i(x_i \mid x_{<i}) = \text{const}` gives entry after entry
    :math:`dx_i = -dF_i / p(x_i \mid x_{<i})`, at a cost of :math:`K` per entry. Make one by :func:`mixture_base`.

    Reference:
        Figurnov, Mohamed, Mnih, "Implicit reparameterization gradients", 2018, https://arxiv.org/abs/1805.08498
    """

    has_rsample = True

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of values of shape ``(*, *batch_shape, features)``."""
        # torch's own sums of events fail on empty batches.
        of_components = self._component_distribution.base_dist.log_prob(value.unsqueeze(-2)).sum(-1)
        return torch.logsumexp(self._mixture_distribution.logits + of_components, -1)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draws samples of shape ``sample_shape + batch_shape + (features,)`` without gradient."""
        # torch's own draws from all components, and fails on empty batches.
        shape = self._extended_shape(check_batch_shape("sample_shape", sample_shape))
        normal, logits = self._component_distribution.base_dist, self._mixture_distribution.logits
        noise = torch.empty(
            shape[:-1] + logits.shape[-1:], dtype=logits.dtype, device=logits.device
        ).exponential_()
        which = (logits - noise.log()).argmax(-1)[..., None, None].expand(*shape[:-1], 1, shape[-1])
        loc, scale = (
            t.expand(*shape[:-1], *t.shape[-2:]).gather(-2, which).squeeze(-2)
            for t in (normal.loc, normal.scale)
        )
        return torch.addcmul(loc, scale, torch.randn_like(loc))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draws reparametrised samples of shape ``sample_shape + batch_shape + (features,)``."""
        x = self.sample(sample_shape)
        normal = self._component_distribution.base_dist
        shares = self._mixture_distribution.logits.expand(
            x.shape[:-1] + self._mixture_distribution.logits.shape[-1:]
        )
        if not torch.is_grad_enabled() or not any(
            t.requires_grad for t in (shares, normal.loc, normal.scale)
        ):
            return x
        entries = []
        for entry, loc, scale in zip(
            x.unbind(-1), normal.loc.unbind(-1), normal.scale.unbind(-1), strict=True
        ):
            component = dist.Normal(loc, scale, validate_args=False)
            at = entry.unsqueeze(-1)
            weights = shares.softmax(-1)
            below = (weights * component.cdf(at)).sum(-1)
            density = (weights * component.log_prob(at).exp()).sum(-1).detach()
            moved = entry - (below - below.detach()) / density.clamp_min(torch.finfo(x.dtype).tiny)
            shares = shares + component.log_prob(moved.unsqueeze(-1))
            entries.append(moved)
        return torch.stack(entries, -1)


def mixture_base(
    locs: Tensor, scales: Tensor | float = 1.0, logits: Tensor | None = None
) -> NormalMixture:
    """A mixture of normals with diagonal covariances, as a base of several modes.

    Args:
        locs: Means of shape ``(components, features)``.
        scales: Standard deviations, broadcast against ``locs``.
        logits: Unnormalised log-weights of shape ``(components,)``; equal weights by default.

    Returns:
        A distribution of event shape ``(features,)``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a shape is wrong or a scale is not positive.

    Example:
        >>> base = mixture_base(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.5)
        >>> base.rsample((5,)).shape
        torch.Size([5, 2])
    """
    if not isinstance(locs, Tensor) or not locs.is_floating_point():
        raise TypeError(
            f"Expected locs to be a floating-point tensor of shape (components, features); got {locs!r}."
        )
    if locs.dim() != 2 or 0 in locs.shape:
        raise ValueError(f"Expected locs of shape (components, features); got {tuple(locs.shape)}.")
    if isinstance(scales, Tensor):
        if scales.dim() > 2 or any(
            n not in (1, m) for n, m in zip(scales.shape[::-1], locs.shape[::-1], strict=False)
        ):
            raise ValueError(
                f"Expected scales that broadcast against locs of {tuple(locs.shape)}; got {tuple(scales.shape)}."
            )
        if not scales.is_meta and not bool((scales > 0).all()):
            raise ValueError("Expected scales to be positive; got a tensor with other values.")
    else:
        scales = torch.full_like(locs, check_positive("scales", scales), requires_grad=False)
    if logits is None:
        logits = torch.zeros_like(locs[:, 0])
    elif not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"Expected logits to be a floating-point tensor of shape ({len(locs)},); got {logits!r}."
        )
    elif logits.shape != locs.shape[:1]:
        raise ValueError(f"Expected logits of shape ({len(locs)},); got {tuple(logits.shape)}.")
    return _normal_mixture(locs, scales.expand_as(locs), logits)


def _normal_mixture(locs: Tensor, scales: Tensor, logits: Tensor) -> NormalMixture:
    normal = dist.Normal(locs, scales, validate_args=False)
    components = torch.distributions.Independent(normal, 1, validate_args=False)
    return NormalMixture(
        torch.distributions.Categorical(logits=logits, validate_args=False),
        components,
        validate_args=False,
    )


class StudentTBase(Recorded, nn.Module):
    r"""A learned base of independent Student-t variables, each with degrees of freedom of its own.

    Called without arguments it gives the distribution. :math:`\log \nu_i` is learned within :math:`\pm 3` of its start, as
    :math:`3 \tanh(a_i / 3)`, and reaches the flow's samples by implicit gradients of the gamma distribution.

    Args:
        features: Entries of the vector.
        df: Degrees of freedom that all entries start with.

    Raises:
        ValueError: If an argument is not positive.

    Reference:
        Jaini, Kobyzev, Yu, Brubaker, "Tails of Lipschitz triangular flows", 2020, https://arxiv.org/abs/1907.04481

    Example:
        >>> base = StudentTBase(3)
        >>> base().rsample((5,)).requires_grad
        True
    """

    def __init__(self, features: int, df: float = 10.0) -> None:
        super().__init__()
        self.event_shape = torch.Size([check_size("features", features)])
        self.start = check_positive("df", df)
        self.raw = nn.Parameter(torch.zeros(self.event_shape))

    def forward(self) -> dist.Independent:
        """Returns the distribution, of event shape ``(features,)``."""
        return _student_t(self.start * soft_clip(self.raw, 3.0).exp())

    def extra_repr(self) -> str:
        return f"{self.event_shape[0]}, df={self.start}"


class NormalMixtureBase(Recorded, nn.Module):
    r"""A learned base of several modes, a :class:`NormalMixture` with all its parameters.

    Called without arguments it gives the distribution. It starts with equal weights at seeded random means of standard
    deviation :math:`\sqrt{1 - s^2}` and with scales :math:`s`, :math:`\log s` learned within :math:`\pm 3` of its start, so
    that a mixture of many components starts close to a standard normal.

    Args:
        features: Entries of the vector.
        components: Number of normals.
        scale: The :math:`s` that all components start with, at most 1.
        seed: Seed of the means.

    Raises:
        ValueError: If an argument is not positive or ``scale`` exceeds 1.

    Reference:
        Izmailov, Kirichenko, Finzi, Wilson, "Semi-supervised learning with normalizing flows", 2020,
        https://arxiv.org/abs/1912.13025

    Example:
        >>> base = NormalMixtureBase(3, components=4)
        >>> base().rsample((5,)).requires_grad
        True
    """

    def __init__(
        self, features: int, components: int = 8, scale: float = 0.5, seed: int = 0
    ) -> None:
        super().__init__()
        self.event_shape = torch.Size([check_size("features", features)])
        self.start = check_positive("scale", scale)
        if self.start > 1:
            raise ValueError(
                f"Expected scale <= 1, the standard deviation of the whole; got {scale}."
            )
        shape = (check_size("components", components), features)
        generator = torch.Generator().manual_seed(check_size("seed", seed, least=0))
        spread = math.sqrt(1 - self.start**2) * torch.randn(
            shape, generator=generator, device="cpu"
        )
        self.locs = nn.Parameter(torch.empty(shape))
        self.raw_scales = nn.Parameter(torch.zeros(shape))
        self.logits = nn.Parameter(torch.zeros(components))
        with torch.no_grad():
            self.locs.copy_(spread)

    def forward(self) -> NormalMixture:
        """Returns the distribution, of event shape ``(features,)``."""
        return _normal_mixture(
            self.locs, self.start * soft_clip(self.raw_scales, 3.0).exp(), self.logits
        )

    def extra_repr(self) -> str:
        return f"{self.event_shape[0]}, components={len(self.logits)}, scale={self.start}"
