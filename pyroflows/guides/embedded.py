"""Flows whose context is a data set, and the guide that such a flow is once the data are given."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._spec import Recorded, build, describe, name_of
from ..distributions import FlowDistribution, FlowMixture
from ..flows import Flow
from ..model.density import LogDensity
from ..nn import Entries, mlp
from ..transforms import LowerTriangularAffine
from .guide import BaseSpace, Guide

__all__ = ["AmortizedGuide", "EmbeddedFlow"]

#: Where least squares leaves next to nothing of an entry, its scale is this share of its sd.
LEAST_SCALE = 1e-3
#: Simulations for each entry of the context from which least squares are fitted.
ENOUGH = 10
#: The ridge of least squares, in variances of the context.
RIDGE = 1e-6


class EmbeddedFlow(Recorded, nn.Module):
    r"""A flow with a data set as context, which an embedding reads.

    .. math:: z = b + W e + L\, f(u; e), \qquad u \sim p_0, \qquad
        e = h\big((x - \mu) / \sigma\big),

    with a flow :math:`f` and an embedding :math:`h` that are trained, and numbers
    :math:`\mu, \sigma, b, W, L` that :meth:`standardize` takes from simulations and that stay as
    they are. Where the embedding has nothing to train, :math:`b + W e` is the least-squares fit of
    :math:`z`, so that the posterior of a linear normal model needs no training at all.

    Args:
        flow: A flow over the whole space with a context of vectors, the output of ``embedding``.
        embedding: A module that takes data of shape ``(n, *shape)`` to ``(n, context_features)``.
        shape: Shape of one data set.

    Example:
        >>> import pyroflows as pf
        >>> flow = EmbeddedFlow(pf.MAF(2, context_features=6), pf.nn.Entries((3,)), shape=(3,))
        >>> flow(torch.zeros(5, 3)).sample().shape
        torch.Size([5, 2])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, flow: Flow, embedding: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.embedding = embedding
        features, context = flow.event_shape[0], flow.context_features
        self.normal = LowerTriangularAffine(features, context, network=mlp(hidden=()))
        self.normal.requires_grad_(False)
        self.flow = Flow([flow.transform, self.normal], flow.given_base)
        self.register_buffer("loc", torch.zeros(self.shape))
        self.register_buffer("scale", torch.ones(self.shape))

    def embed(self, x: Tensor) -> Tensor:
        """The context of the flow, from data of shape ``(*, *shape)``."""
        return self.embedding((x - self.loc) / self.scale)

    def forward(self, x: Tensor) -> FlowDistribution:
        """Returns the distribution given data.

        Args:
            x: Tensor of shape ``(n, *shape)``.

        Returns:
            A distribution of batch shape ``(n,)``.
        """
        return self.flow(self.embed(x))

    @torch.no_grad()
    def standardize(self, z: Tensor, x: Tensor) -> None:
        """Takes the frozen numbers from simulations.

        Args:
            z: Vectors of shape ``(n, features)``.
            x: Data of shape ``(n, *shape)``.
        """
        self.loc.copy_(x.mean(0))
        scale = x.std(0)
        self.scale.copy_(scale.where(scale > 0, 1.0))
        if isinstance(self.embedding, Entries):
            self.embedding.fit((x - self.loc) / self.scale)
        e = self.embed(x)
        trained = any(p.requires_grad for p in self.embedding.parameters())
        if trained or len(z) < ENOUGH * e.shape[1]:
            e = torch.zeros_like(e)
        b, weight, residual = _least_squares(e.double(), z.double())
        floor = LEAST_SCALE * z.double().std(0)
        covariance = residual.mT @ residual / len(z) + torch.diag(floor.square())
        root = torch.linalg.cholesky(covariance)
        conditioner: Any = self.normal.conditioner
        conditioner.start_at(
            torch.cat([b, root.diagonal().log(), root.tril(-1).flatten()]).to(z.dtype)
        )
        conditioner.input.weight[: len(b)] = weight.mT


def _least_squares(e: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets ``(d,)``, weights ``(c, d)`` and residuals ``(n, d)`` of a ridge regression."""
    means = e.mean(0), z.mean(0)
    e, z = e - means[0], z - means[1]
    # Next to nothing, for entries that are functions of others or never vary.
    ridge = torch.eye(e.shape[1], dtype=e.dtype, device=e.device) * (RIDGE * len(e))
    weight = torch.linalg.solve(e.mT @ e + ridge, e.mT @ z)
    return means[1] - means[0] @ weight, weight, z - e @ weight


class AmortizedGuide(Guide):
    r"""Flows that have learned :math:`q(z \mid x)` from simulations, at the data at hand.

    .. math:: q(z) = \frac{1}{K} \sum_k q_k(z \mid x).

    Args:
        flows: The flows, :class:`EmbeddedFlow` or modules like it.
        x: The data, of shape ``(*shape)``.
        centres: For circular sites the angles at zero.

    Example:
        >>> import pyroflows as pf
        >>> flow = EmbeddedFlow(pf.MAF(2, context_features=6), pf.nn.Entries((3,)), shape=(3,))
        >>> AmortizedGuide([flow], torch.zeros(3)).sample(5).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        flows: Sequence[EmbeddedFlow],
        x: Tensor,
        centres: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.flows = [flow.eval() for flow in flows]
        self.x, self._centres = x, dict(centres or {})
        self.features = flows[0].flow.event_shape[0]

    def get_posterior(self) -> FlowDistribution | FlowMixture:
        """The distribution of the unconstrained vector."""
        components = self._components()
        if len(components) == 1:
            return components[0]
        return FlowMixture(components, self.x.new_zeros(len(components)), validate_args=False)

    def _components(self) -> list[FlowDistribution]:
        embedded = [flow.embed(self.x.unsqueeze(0)).squeeze(0) for flow in self.flows]
        return [flow.flow(e) for flow, e in zip(self.flows, embedded, strict=True)]

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws vectors and scores them; see :meth:`Guide.sample_and_log_prob`."""
        return self.get_posterior().rsample_and_log_prob((n,))

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores vectors; see :meth:`Guide.log_prob`."""
        return self.get_posterior().log_prob(z)

    def base_spaces(self) -> Sequence[BaseSpace]:
        """The base of each flow, with its share."""
        components = self._components()
        if len(components) == 1:
            return (BaseSpace(components[0].transform, components[0].base_dist),)
        mixture = self.get_posterior()
        return tuple(
            BaseSpace(each.transform, each.base_dist, functools.partial(_log_share, mixture, k))
            for k, each in enumerate(components)
        )

    def centres(self) -> dict[str, Tensor]:
        """Those of the simulations; see :meth:`Guide.centres`."""
        return self._centres

    def spec(self) -> dict[str, Any]:
        """Plain data from which the guide is made anew; see :meth:`Guide.spec`."""
        flows = [describe(flow) for flow in self.flows]
        return {
            "guide": name_of(type(self)),
            "flows": flows,
            "x": self.x,
            "centres": self._centres,
        }

    def state_dict(self) -> dict[str, Any]:
        """The numbers of the flows; see :meth:`Guide.state_dict`."""
        return dict(nn.ModuleList(self.flows).state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Sets the numbers of the flows."""
        return nn.ModuleList(self.flows).load_state_dict(state)

    @classmethod
    def make(cls, spec: Mapping[str, Any], density: LogDensity) -> AmortizedGuide:
        """Makes the guide of a spec."""
        return cls([build(flow) for flow in spec["flows"]], spec["x"], spec["centres"])


def _log_share(mixture: FlowMixture, component: int, z: Tensor) -> Tensor:
    return mixture.component_log_probs(z).log_softmax(-1)[:, component]
