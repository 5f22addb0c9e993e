"""Distributions that take NaN as missing, by operations that do not branch on values."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .._compat import mask_of
from .sites import base_distribution

__all__ = ["TAKE_NAN", "MissingData"]

#: The distributions of Pyro whose data may be NaN.
TAKE_NAN = (dist.NanMaskedNormal, dist.NanMaskedMultivariateNormal)


class MissingData(Messenger):
    """Lets distributions that take NaN as missing be evaluated for many points at a time."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and isinstance(base_distribution(msg["fn"]), TAKE_NAN):
            msg["fn"] = _replaced(msg["fn"])


def _replaced(fn: Any) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        return _replaced(fn.base_dist).mask(mask_of(fn))
    if isinstance(fn, torch.distributions.Independent):
        return _replaced(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.ExpandedDistribution):
        return _replaced(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, dist.NanMaskedNormal):
        return _Normal(fn.loc, fn.scale, validate_args=False)
    return _MultivariateNormal(fn.loc, scale_tril=fn.scale_tril, validate_args=False)


class _Normal(dist.Normal):
    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return super().expand(batch_shape, self._get_checked_instance(_Normal, _instance))

    def log_prob(self, value: Tensor) -> Tensor:
        seen = value.isfinite()
        return super().log_prob(value.where(seen, 0.0)).where(seen, 0.0)


class _MultivariateNormal(dist.MultivariateNormal):
    """The marginal of the entries that are seen; the others have variance one, no deviation."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(_MultivariateNormal, _instance)
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        seen = value.isfinite()
        both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
        covariance = self.covariance_matrix.where(both, torch.diag_embed((~seen).to(value)))
        root = torch.linalg.cholesky(covariance)
        deviation = (value - self.loc).where(seen, 0.0)
        white = torch.linalg.solve_triangular(root, deviation.unsqueeze(-1), upper=False)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * math.log(2 * math.pi) * seen.sum(-1)
        return -0.5 * white.squeeze(-1).square().sum(-1) - log_det - constant
