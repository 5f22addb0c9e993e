"""The right numbers of the models of :mod:`benchmarks.scale_models`.

Run `python -m benchmarks.scale_references [NAME ...]`: means and standard deviations of the globals
on the unconstrained scale, and the log evidence, in double precision. Where the locals can be
integrated out (:mod:`benchmarks.scale_closed_forms`), the globals are drawn from a Student
distribution about their mode and weighted; else NumPyro's NUTS runs long chains, and there is no
evidence. What has mixed is stored in `benchmarks/results/scale_references.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from scipy import optimize, stats
from torch import Tensor
from torch.distributions import biject_to

from benchmarks.methods import start_at
from benchmarks.pyro_models import Moments, entries
from benchmarks.scale_closed_forms import CLOSED_FORMS
from benchmarks.scale_models import NAMES, Case, make_case, split_name

STORED = Path(__file__).parent / "results" / "scale_references.json"
# Draws of each proposal, the last of which answers, and its degrees of freedom.
DRAWS = (512, 1024, 4096)
FREEDOM = 5.0
# Rows times points at once.
ROOM = 4_000_000
# What is known by fewer independent draws, or by chains that have not mixed, is not stored.
LEAST_ESS, LARGEST_RHAT = 400, 1.02


@dataclass(frozen=True)
class Reference:
    """What is known of a posterior.

    Args:
        method: How.
        moments: Mean and standard deviation of each global on the unconstrained scale.
        ess: By how many independent draws, at least.
        log_evidence: The log evidence; `None` where it is not known.
        log_evidence_error: Its standard error.
        rhat: The largest R-hat; one where there are no chains.
        seconds: CPU seconds it took.
    """

    method: str
    moments: Moments
    ess: float
    log_evidence: float | None = None
    log_evidence_error: float | None = None
    rhat: float = 1.0
    seconds: float = 0.0

    @property
    def known(self) -> bool:
        """Whether it answers."""
        return self.ess >= LEAST_ESS and self.rhat <= LARGEST_RHAT


def read_references() -> dict[str, Reference]:
    """The stored references by model."""
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    return {name: Reference(**found) for name, found in stored.items()}


def store_reference(name: str, found: Reference) -> None:
    """Stores a reference beside the others."""
    known = read_references() | {name: found}
    content = {name: asdict(known[name]) for name in sorted(known)}
    STORED.write_text(json.dumps(content, indent=1) + "\n")


# The globals as a vector


def _count(node: dict[str, Any]) -> int:
    """The unconstrained entries of a latent site; zero of other nodes."""
    if node["type"] != "sample" or node["is_observed"] or site_is_subsample(node):
        return 0
    return math.prod(biject_to(node["fn"].support).inverse_shape(node["value"].shape))


class Globals:
    """The global sites of a case, whose priors do not depend on anything.

    Args:
        case: The case.

    Attributes:
        priors: Their priors by name.
        shapes: Their shapes on the unconstrained scale.
        latents: Entries of all latent sites on the unconstrained scale.
    """

    def __init__(self, case: Case) -> None:
        started = InitMessenger(start_at)(case.model)
        nodes = poutine.trace(started).get_trace(*case.args).nodes
        self.priors = {name: nodes[name]["fn"] for name in case.globals}
        self.latents = sum(map(_count, nodes.values()))
        self._transforms = {name: biject_to(prior.support) for name, prior in self.priors.items()}
        self.shapes = {
            name: self._transforms[name].inverse_shape(prior.shape())
            for name, prior in self.priors.items()
        }

    @property
    def features(self) -> int:
        """Entries of the vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def unconstrain(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes draws of shape ``(n, *shape)`` by site to the unconstrained scale."""
        return {name: self._transforms[name].inv(draws[name]) for name in self.priors}

    def split(self, points: Tensor) -> dict[str, Tensor]:
        """Takes vectors of shape ``(n, features)`` apart."""
        parts = points.split([math.prod(shape) for shape in self.shapes.values()], -1)
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape(-1, *shape) for (name, shape), part in pairs}

    def constrain(self, points: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the sites at vectors, and the log density of their priors there."""
        values, total = {}, points.new_zeros(len(points))
        for name, part in self.split(points).items():
            transform, prior = self._transforms[name], self.priors[name]
            values[name] = transform(part)
            log_prob = prior.log_prob(values[name])
            log_det = transform.log_abs_det_jacobian(part, values[name])
            total = total + log_prob.reshape(len(points), -1).sum(-1)
            total = total + log_det.reshape(len(points), -1).sum(-1)
        return values, total


def marginal_density(name: str, case: Case) -> Callable[[Tensor], Tensor]:
    """Returns the log density of the globals with the locals integrated out.

    Args:
        name: The model's name.
        case: The model.
    """
    family, _ = split_name(name)
    sites, log_likelihood = Globals(case), CLOSED_FORMS[family]

    def log_density(points: Tensor) -> Tensor:
        values, prior = sites.constrain(points)
        return prior + log_likelihood(values, *case.args)

    return log_density


# Weighted draws


def weigh(
    log_density: Callable[[Tensor], Tensor],
    features: int,
    chunk: int,
    draws: Sequence[int] = DRAWS,
) -> tuple[Tensor, Tensor, float]:
    """Draws from a Student distribution about the mode, which is then fitted to the weighted draws.

    Args:
        log_density: Of points of shape ``(n, features)``.
        features: The number of features.
        chunk: Points at once.
        draws: Draws of each round.

    Returns:
        The last round's points, their normalised weights, and the log evidence.
    """
    mean, covariance = find_mode(log_density, features)
    for seed, count in enumerate(draws):
        root = torch.linalg.cholesky(covariance)
        noise, log_q = _student(count, features, seed)
        points = mean + noise @ root.mT
        log_q = log_q - root.diagonal().log().sum()
        with torch.no_grad():
            log_p = torch.cat([log_density(part) for part in points.split(chunk)])
        log_weights = (log_p - log_q).nan_to_num(-math.inf)
        weights = log_weights.softmax(0)
        mean = weights @ points
        centred = points - mean
        covariance = centred.mT @ (weights.unsqueeze(-1) * centred)
    return points, weights, float(log_weights.logsumexp(0)) - math.log(count)


def _student(count: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scrambled Sobol draws of a multivariate Student distribution, and their log density."""
    uniform = stats.qmc.Sobol(features + 1, rng=seed).random(count)
    uniform = uniform.clip(1e-12, 1 - 1e-12)
    normal = stats.norm.ppf(uniform[:, :features])
    scale = np.sqrt(FREEDOM / stats.chi2.ppf(uniform[:, features], FREEDOM))
    noise = normal * scale[:, None]
    log_q = stats.multivariate_t(np.zeros(features), np.eye(features), FREEDOM).logpdf(noise)
    return torch.as_tensor(noise), torch.as_tensor(log_q).reshape(-1)


def find_mode(log_density: Callable[[Tensor], Tensor], features: int) -> tuple[Tensor, Tensor]:
    """Finds the mode from zero, and the inverse of the curvature there."""

    def negative(x: Any) -> tuple[float, Any]:
        point = torch.as_tensor(x).requires_grad_()
        value = -log_density(point.unsqueeze(0))[0]
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient.numpy()

    found = optimize.minimize(negative, np.zeros(features), jac=True, method="BFGS")
    mode = torch.as_tensor(found.x)
    curvature = -torch.autograd.functional.hessian(lambda x: log_density(x.unsqueeze(0))[0], mode)
    eigenvalues, vectors = torch.linalg.eigh(curvature)
    return mode, (vectors / eigenvalues.abs().clamp_min(1e-2)) @ vectors.mT


def find_by_weights(name: str) -> Reference:
    """Finds the reference of a model whose locals can be integrated out.

    Args:
        name: The model's name.
    """
    start = time.process_time()
    before = torch.get_default_dtype()
    case = make_case(name).double()
    torch.set_default_dtype(torch.float64)
    try:
        sites = Globals(case)
        chunk = max(1, ROOM // case.rows)
        log_density = marginal_density(name, case)
        points, weights, log_evidence = weigh(log_density, sites.features, chunk)
    finally:
        torch.set_default_dtype(before)
    moments = {}
    for scalar, values in entries(sites.split(points)).items():
        mean = weights @ values
        variance = weights @ (values - mean).square()
        moments[scalar] = (float(mean), float(variance.sqrt()))
    ess = 1 / float(weights.square().sum())
    error = math.sqrt(max(0.0, 1 / ess - 1 / len(weights)))
    seconds = time.process_time() - start
    return Reference("weighted draws", moments, ess, log_evidence, error, seconds=seconds)


# Long chains


def find_by_chains(name: str) -> Reference:
    """Finds the reference of a model by NumPyro's NUTS in double precision.

    Args:
        name: The model's name.
    """
    from benchmarks.scale_numpyro import LONG, run_nuts

    found = run_nuts(name, schedule=LONG, noncentred=True, seed=0)
    moments = {scalar: (float(v.mean()), float(v.std())) for scalar, v in found.scalars.items()}
    return Reference(
        f"NumPyro NUTS, {LONG.chains} x ({LONG.warmup} + {LONG.draws})",
        moments,
        found.ess,
        rhat=found.rhat,
        seconds=found.warmup + found.sampling,
    )


def find_reference(name: str) -> Reference:
    """Finds the right numbers of a model, by weighted draws or by long chains."""
    family, _ = split_name(name)
    return find_by_weights(name) if family in CLOSED_FORMS else find_by_chains(name)


def use_one_thread() -> None:
    """Lets torch, and JAX if it is not yet there, compute on one thread."""
    torch.set_num_threads(1)
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", flags)


def main(argv: Sequence[str] | None = None) -> None:
    """Finds and stores references from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale_references", description=__doc__
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all by default")
    options = parser.parse_args(argv)
    use_one_thread()
    for name in options.names or NAMES:
        found = find_reference(name)
        if found.known:
            store_reference(name, found)
        kept = "" if found.known else ", not stored"
        evidence = "" if found.log_evidence is None else f", log evidence {found.log_evidence:.3f}"
        print(
            f"{name}: ess {found.ess:.0f}, rhat {found.rhat:.3f}{evidence}, "
            f"{found.seconds:.0f} CPU s{kept}",
            flush=True,
        )


if __name__ == "__main__":
    main()
