"""Yesterday's posterior as today's prior."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints

from .._checks import check_model, check_tensor
from .._random import seeded
from ..distributions import FlowDistribution
from ..flows import Flow
from ..guides import AutoFlow, WhitenedFlow
from ..guides.auto import whitened_flow
from ..guides.guide import Guide
from ..model.density import LogDensity
from ..model.sites import LatentSite, split_vector
from ..train.likelihood import fit_density
from ..transforms import LowerTriangularAffine

__all__ = ["SitesPrior", "learn_prior"]

#: Most passes through the draws from which a marginal is learned.
EPOCHS = 60


class OnSites(constraints.Constraint):
    """Vectors that hold the values of sites one after another, each on its support.

    Args:
        sites: The sites.
    """

    is_discrete = False
    event_dim = 1

    def __new__(cls, *args: Any) -> OnSites:
        # With the first one, unpickled ones too, because importing must not change torch's table.
        biject_to.register(cls, _onto_sites)
        return super().__new__(cls)

    def __init__(self, sites: Sequence[LatentSite]) -> None:
        self.sites = tuple(sites)
        super().__init__()

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """The values of the sites, by name, from vectors of shape ``(*, entries)``."""
        parts = value.split([site.shape.numel() for site in self.sites], -1)
        pairs = zip(self.sites, parts, strict=True)
        return {site.name: part.reshape(part.shape[:-1] + site.shape) for site, part in pairs}

    def check(self, value: Tensor) -> Tensor:
        """Whether each vector has all its parts on their supports."""
        inside = torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
        for site, part in zip(self.sites, self.split(value).values(), strict=True):
            good = site.transform.codomain.check(part)
            inside = inside & good.reshape(*inside.shape, -1).all(-1)
        return inside


class OntoSites(torch.distributions.Transform):
    """The map from unconstrained vectors to the values of sites.

    Args:
        sites: The sites.
    """

    bijective = True
    domain = constraints.real_vector

    def __init__(self, sites: Sequence[LatentSite]) -> None:
        super().__init__()
        self.sites = tuple(sites)

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """The constraint on values."""
        return OnSites(self.sites)

    def forward_shape(self, shape: Any) -> torch.Size:
        """The shape of values, from that of unconstrained vectors."""
        return torch.Size([*shape[:-1], sum(site.shape.numel() for site in self.sites)])

    def inverse_shape(self, shape: Any) -> torch.Size:
        """The shape of unconstrained vectors, from that of values."""
        return torch.Size([*shape[:-1], sum(site.features for site in self.sites)])

    def _call(self, x: Tensor) -> Tensor:
        values = [site.transform(part) for site, part in split_vector(self.sites, x)]
        return torch.cat([value.reshape(*x.shape[:-1], -1) for value in values], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        values = OnSites(self.sites).split(y)
        return torch.cat([site.pack(values[site.name]) for site in self.sites], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log-Jacobian, of the batch shape."""
        total = x.new_zeros(x.shape[:-1])
        for site, part in split_vector(self.sites, x):
            log_det = site.log_det(part, site.transform(part))
            total = total + log_det.reshape(*x.shape[:-1], -1).sum(-1)
        return total


def _onto_sites(constraint: OnSites) -> OntoSites:
    return OntoSites(constraint.sites)


class SitesPrior(FlowDistribution):
    """The joint distribution of some sites of a posterior, as one vector of their values.

    It is a distribution for any place in a model: ``pyro.sample("theta", prior)`` draws the values
    of the sites one after another, of which :meth:`split` makes the sites. :meth:`replace` puts it
    in the place of the sites' priors in their own model, or another one.

    Args:
        flow: A flow over the unconstrained values, whose parameters stay as they are.
        sites: The sites.
    """

    def __init__(self, flow: Flow, sites: Sequence[LatentSite]) -> None:
        self.flow = flow.requires_grad_(False).eval()
        self.sites = tuple(sites)
        super().__init__(flow.base, flow.transform, OnSites(sites), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SitesPrior:
        new = self._get_checked_instance(SitesPrior, _instance)
        new.flow, new.sites = self.flow, self.sites
        super().expand(batch_shape, _instance=new)
        return new

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """Gives the values of the sites.

        Args:
            value: Vectors of shape ``(*, *event_shape)``.

        Returns:
            For each site a tensor of shape ``(*, *site_shape)``.

        Raises:
            TypeError: If ``value`` is no tensor.
            ValueError: If it is of another shape.
        """
        return OnSites(self.sites).split(check_tensor("value", value, self.event_shape))

    def replace(self, model: Callable[..., Any], name: str = "prior") -> Callable[..., Any]:
        """Makes a model in which this prior takes the place of those of its sites.

        They become deterministic functions of one site, which holds them all.

        Args:
            model: A model with sites of these names, of the same shapes.
            name: The name of that site.

        Returns:
            The model.

        Raises:
            TypeError: If ``model`` is no callable, or ``name`` no string.
            ValueError: If ``name`` is that of one of the sites; when the model is run, if it has
                one of another shape, observes one, or lacks one.
        """
        return Replaced(self, model, name)


class Replaced:
    """A model with another prior of some sites; see :meth:`SitesPrior.replace`."""

    def __init__(self, prior: SitesPrior, model: Callable[..., Any], name: str) -> None:
        check_model(model)
        if not isinstance(name, str):
            raise TypeError(f"Expected name to be a string; got {name!r}.")
        if name in [site.name for site in prior.sites]:
            raise ValueError(f"Expected a name that none of the prior's sites has; got {name!r}.")
        self.prior, self.model, self.name = prior, model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        values = self.prior.split(pyro.sample(self.name, self.prior))
        with _Deterministic(values) as replaced:
            result = self.model(*args, **kwargs)
        lacking = sorted(set(values) - replaced.seen)
        if lacking:
            raise ValueError(
                f"Expected a model with the sites of its prior, {', '.join(values)}; it has no "
                f"{lacking[0]!r}."
            )
        return result


class _Deterministic(Messenger):
    """Makes sites deterministic."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.seen: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.values:
            return
        if msg["is_observed"]:
            raise ValueError(
                f"Expected {msg['name']!r} to be latent in the model, because it has a prior; got "
                "it observed."
            )
        self.seen.add(msg["name"])
        value, event_dim = self.values[msg["name"]], msg["fn"].event_dim
        shape = msg["fn"].shape()
        if value.shape[max(0, value.dim() - len(shape)) :] != shape:
            raise ValueError(
                f"Expected {msg['name']!r} of shape {tuple(value.shape)}, as in the posterior that "
                f"gave its prior; got {tuple(shape)} in the model."
            )
        msg["fn"] = dist.Delta(value, event_dim=event_dim).mask(False)
        msg["value"], msg["is_observed"], msg["done"] = value, True, True
        msg["infer"] = {**msg["infer"], "_deterministic": True}


def learn_prior(
    density: LogDensity,
    guide: Guide | None,
    draw: Callable[[], Tensor],
    sites: Sequence[str] | None,
    seed: int | None,
) -> SitesPrior:
    """Makes the distribution of some sites; see :meth:`pyroflows.Posterior.as_prior`.

    Args:
        density: The log density of the model.
        guide: The guide, if it is the posterior as it stands, without a correction.
        draw: Draws vectors of the posterior, of shape ``(n, features)``.
        sites: Names of the sites; all of them by default.
        seed: Seed of the fit.

    Raises:
        ValueError: If a site has masked entries.
    """
    known = [site.name for site in density.sites]
    names = known if sites is None else sites
    chosen = [site for site in density.sites if site.name in names]
    for site in chosen:
        if not site.complete:
            raise ValueError(f"Expected sites without masked entries; got {site.name!r} with some.")
    if len(chosen) == len(known) and isinstance(guide, AutoFlow):
        return SitesPrior(copy.deepcopy(guide.flow), chosen)
    sizes = [site.features for site in density.sites]
    parts = dict(zip(known, draw().split(sizes, -1), strict=True))
    with seeded(seed):
        flow = _fit_marginal(torch.cat([parts[site.name] for site in chosen], -1), seed)
    return SitesPrior(flow, chosen)


def _fit_marginal(z: Tensor, seed: int | None) -> WhitenedFlow:
    """Fits a flow to draws, from their mean and covariance on, which it has in the end too
    unless they are very many."""
    flow = whitened_flow(None, z.mean(0), 1.0)
    flow.whiten(*_moments(z))
    options: dict[str, Any] = {"batch_size": 512, "max_epochs": EPOCHS, "patience": EPOCHS}
    fit_density(flow, z, average=0.99, seed=seed, progress=False, **options)
    if isinstance(flow.whitening, LowerTriangularAffine):
        with torch.no_grad():
            (loc, scale), (mean, spread) = _moments(z), _moments(flow().sample((len(z),)))
            turn = torch.linalg.solve_triangular(spread, scale, upper=False, left=False)
            of_flow, tril = flow.whitening.loc_and_scale_tril()
            flow.whiten(loc + turn @ (of_flow - mean), (turn @ tril).tril())
    return flow


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of draws, and the Cholesky factor of their covariance."""
    covariance = z.mT.cov().reshape(z.shape[-1], -1)
    return z.mean(0), torch.linalg.cholesky(covariance)
