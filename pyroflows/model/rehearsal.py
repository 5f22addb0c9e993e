"""A run of a model beside its guide, which tells the rows that the model sees and their data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import broadcast_shape
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from .handlers import GivenRows
from .sites import WRAPPERS, base_distribution, unmasked_entries

__all__ = [
    "Coordinates",
    "batch_axes",
    "frame_of",
    "observed_rows",
    "rehearse",
    "rows_of",
]

Node = dict[str, Any]

#: Distributions of ``loc + scale * noise``, or of its exponential.
LOC_SCALE = (
    torch.distributions.Normal,
    torch.distributions.LogNormal,
    torch.distributions.StudentT,
    torch.distributions.Laplace,
    torch.distributions.Cauchy,
    torch.distributions.Gumbel,
)


class AgreedRows(GivenRows):
    """Gives plates their rows, and refuses others that the model has chosen itself.

    Pyro replays the rows of a guide in the model, whatever index the model gives its plate
    (pyro #3468), so that the two would see different data without a word.
    """

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg) and name in self.rows and msg["value"] is not None:
            own, given = torch.as_tensor(msg["value"]), torch.as_tensor(self.rows[name])
            if not torch.jit.is_tracing() and not torch.equal(own, given):
                raise ValueError(
                    f"Expected the rows of plate {name!r} that the model has chosen; got others "
                    "from the guide around this one. Give it create_plates=, a function that makes "
                    "the plate with the same subsample."
                )
        super()._pyro_sample(msg)


class Placeholders(Messenger):
    """Gives latent sites values: those that are known, and zero in unconstrained coordinates.

    Args:
        values: Values by name.
        like: For each continuous latent site a tensor of its dtype and device.
    """

    def __init__(self, values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.like = values, like

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["done"] or msg["is_observed"] or site_is_subsample(msg):
            return
        if name in self.values:
            msg["value"], msg["done"] = self.values[name], True
        elif name in self.like:
            msg["value"], msg["done"] = _middle(msg["fn"], self.like[name]), True


def _middle(fn: Any, like: Tensor) -> Tensor:
    """The value of a distribution whose unconstrained coordinates are zero."""
    onto = biject_to(fn.support)
    return onto(like.new_zeros(onto.inverse_shape(fn.shape())))


def rehearse(
    model: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
) -> Any:
    """Runs a model unseen by the handlers around it.

    Nothing continuous is drawn, so that priors need no sampler; the plates choose their rows as
    they would in any run.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values of some latent sites.
        like: For each continuous latent site a tensor of its dtype and device.
        rows: The rows of some plates, where these do not choose them.

    Returns:
        The trace, which carries a graph where gradients are enabled.
    """
    handled = AgreedRows(rows)(Placeholders(values, like)(model))
    with poutine.block(), pyro.validation_enabled(False):
        return poutine.trace(handled).get_trace(*args, **kwargs)


def frame_of(node: Node, plate: str) -> Any:
    """The frame of a plate around a sample statement, or ``None``."""
    frames = (frame for frame in node["cond_indep_stack"] if frame.vectorized)
    return next((frame for frame in frames if frame.name == plate), None)


def batch_axes(node: Node) -> dict[int, Any]:
    """The vectorised plates around a sample statement by their dimensions, from the right."""
    frames = (frame for frame in node["cond_indep_stack"] if frame.vectorized)
    return {frame.dim: frame for frame in frames}


def observed_rows(node: Node, plate: str) -> tuple[Tensor, Tensor | None]:
    """The values of an observed site with the rows of a plate in front.

    Args:
        node: The node of the site, inside of the plate.
        plate: The name of the plate.

    Returns:
        Values of shape ``(rows, *other plates, *event)``, zero where a mask switches them off; and
        the mask, of the same shape, ``None`` where there is none.
    """
    value = torch.as_tensor(node["value"])
    frames, event_dim = batch_axes(node), node["fn"].event_dim
    sizes = [frames[dim].size if dim in frames else 1 for dim in range(min(frames), 0)]
    event = value.shape[value.dim() - event_dim :]
    shape = broadcast_shape(value.shape, (*sizes, *event))
    axis = len(shape) - event_dim + frame_of(node, plate).dim
    values = value.expand(shape).movedim(axis, 0)
    if not _is_masked(node):
        return values, None
    mask = unmasked_entries({**node, "value": value.expand(shape)}).movedim(axis, 0)
    return values.where(mask, torch.zeros_like(values)), mask


def _is_masked(node: Node) -> bool:
    if node["mask"] is not None:
        return True
    fn = node["fn"]
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, pyro.distributions.MaskedDistribution):
            return True
        fn = fn.base_dist
    return False


def rows_of(value: Any, full_size: int, size: int, index: Tensor | None) -> Tensor | None:
    """The rows of an argument that a plate sees.

    Args:
        value: An argument of the model.
        full_size: Rows of the plate.
        size: Rows that it sees.
        index: Which.

    Returns:
        The tensor of these rows, of all that it has if it has only these; ``None`` where the
        argument is no tensor with a row for each of the plate.
    """
    if not isinstance(value, Tensor) or not value.dim():
        return None
    if len(value) == full_size:
        return value if index is None or size == full_size else value[index]
    return value if len(value) == size else None


class Coordinates:
    r"""The coordinates of a local site between its prior and a fixed place.

    .. math:: x = T(m + s\, u), \qquad
        m = \mu_0 + (1 - \lambda)(\mu(\theta) - \mu_0), \qquad
        s = \sigma_0^\lambda\, \sigma(\theta)^{1 - \lambda},

    with the location and scale of the prior at the globals and at a reference, where it has these;
    else :math:`m = 0` and :math:`s = 1`. With :math:`\lambda = 0` a site moves with its prior
    (non-centred), as suits rows with little data; with :math:`\lambda = 1` it stays (centred).

    Args:
        node: The node of the site in a rehearsal at the globals.
        reference: The node in a rehearsal at the reference.

    Reference:
        Gorinova, Moore, Hoffman, "Automatic reparameterisation of probabilistic programs", 2019,
        https://arxiv.org/abs/1906.03028
    """

    def __init__(self, node: Node, reference: Node) -> None:
        self.event_dim = node["fn"].event_dim
        self.onto = biject_to(node["fn"].support)
        self.prior, self.reference = _loc_scale(node["fn"]), _loc_scale(reference["fn"])

    def value_and_log_det(self, u: Tensor, centring: Tensor) -> tuple[Tensor, Tensor]:
        r"""Maps coordinates to a value of the site.

        Args:
            u: Tensor of the unconstrained shape, with the batch dimensions of draws in front.
            centring: The shares :math:`\lambda`, of that shape too.

        Returns:
            The value, and the log-Jacobian of each event.
        """
        z, spread = u, torch.zeros_like(u)
        if self.prior is not None and self.reference is not None:
            (loc, scale), (fixed, unit) = self.prior, self.reference
            spread = (centring * unit.log() + (1 - centring) * scale.log()).expand_as(u)
            z = fixed + (1 - centring) * (loc - fixed) + spread.exp() * u
        value = self.onto(z)
        log_det = self.onto.log_abs_det_jacobian(z, value)
        batch_dim = value.dim() - self.event_dim
        return value, _sum(log_det, log_det.dim() - batch_dim) + _sum(spread, z.dim() - batch_dim)


def _loc_scale(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Location and scale of the unconstrained values of a distribution, where it has these."""
    inner = base_distribution(fn)
    if isinstance(inner, LOC_SCALE):
        return inner.loc, inner.scale
    if isinstance(inner, torch.distributions.MultivariateNormal):
        return inner.loc, inner.variance.sqrt()
    return None


def _sum(value: Tensor, dims: int) -> Tensor:
    return value.sum(tuple(range(-dims, 0))) if dims else value
