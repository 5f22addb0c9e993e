"""The benchmark of real models: Pyro's own examples and tutorials, fitted with defaults, against
closed forms and long chains.

Run `python -m benchmarks.real_models [NAME ...]`; with `--reference` the right numbers are found anew
in float64, by Pyro's NUTS or by weighted draws of the prior, of the model or of its entry in
:mod:`benchmarks.pyro_references`, and stored in `benchmarks/results/real_models_reference.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from arviz import ess, rhat
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, config_enumerate
from torch import Tensor

import benchmarks.pyro_sequences  # noqa: F401  (enters its models)
import pyroflows as pf
from benchmarks.posteriors import machine
from benchmarks.pyro_models import MODELS, Case, Moments, entries
from benchmarks.pyro_references import REFERENCES, Reference

REFERENCE = Path(__file__).parent / "results" / "real_models_reference.json"
TIME_LIMIT = 120.0
DRAWS = 4000
# A posterior is right if no mean is off by more standard deviations, and no sd by a larger factor.
RIGHT = 0.2
CHAINS, CHAIN_DRAWS, WARMUP = 2, 1500, 300
PRIOR_CHUNK = 50_000
# Chains that have not mixed answer nothing, and are not stored.
LEAST_ESS, LARGEST_RHAT = 200, 1.03


@dataclass(frozen=True)
class Row:
    """One fit.

    Args:
        model: The model's name.
        seed: The seed.
        mode: How its density is evaluated; ``""`` if the fit failed.
        features: Entries of the unconstrained vector.
        mean_error: Largest |mean - right mean| / right sd.
        log_sd_error: Largest |log(sd / right sd)|.
        right: Whether both are at most `RIGHT`; `None` where the right numbers are not known.
        ok: The verdict.
        seconds: Wall-clock seconds of the fit.
        late: Seconds by which it outlasted the time limit.
        rung: The rung that was kept.
        sentence: The verdict in words, or the error.
    """

    model: str
    seed: int
    mode: str = ""
    features: int = 0
    mean_error: float = math.nan
    log_sd_error: float = math.nan
    right: bool | None = None
    ok: bool = False
    seconds: float = 0.0
    late: float = 0.0
    rung: str = ""
    sentence: str = ""

    @property
    def outcome(self) -> str:
        """A word for what came of it."""
        if not self.mode:
            return "failed"
        if self.ok:
            return {True: "right", False: "WRONG", None: "unknown"}[self.right]
        return "not trusted"


def run_row(name: str, seed: int, time_limit: float, right: Moments) -> Row:
    """Fits a model with defaults and compares its posterior with the right numbers.

    Args:
        name: The model's name.
        seed: The seed.
        time_limit: Seconds for the fit.
        right: Mean and standard deviation of each scalar.
    """
    case = MODELS[name]()
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = pf.fit_posterior(
                case.model, case.args, seed=seed, time_limit=time_limit, progress=False
            )
    except Exception as error:  # the row says which
        return Row(name, seed, sentence=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    draws = scalars_of(case, posterior.sample(DRAWS))
    mean, log_sd = compare(draws, right) if right else (math.nan, math.nan)
    return Row(
        name,
        seed,
        posterior.density.mode,
        posterior.density.features,
        mean,
        log_sd,
        max(mean, log_sd) <= RIGHT if right else None,
        posterior.verdict.ok,
        seconds,
        max(0.0, seconds - time_limit),
        posterior.name,
        str(posterior.verdict),
    )


def scalars_of(case: Case, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scalars by which a case is compared."""
    return (case.scalars or entries)(draws)


def compare(draws: dict[str, Tensor], right: Moments) -> tuple[float, float]:
    """The largest error of a mean, in standard deviations, and of a log standard deviation.

    >>> compare({"x": torch.tensor([1.0, 2.0, 3.0])}, {"x": (1.5, 1.0)})
    (0.5, 0.0)
    """
    means = [abs(float(draws[name].mean()) - mean) / sd for name, (mean, sd) in right.items()]
    sds = [abs(math.log(float(draws[name].std()) / sd)) for name, (_, sd) in right.items()]
    return max(means), max(sds)


# Long chains


def long_run(name: str) -> dict[str, Any]:
    """Finds the moments of a case's scalars in float64, by NUTS or by weighted draws of the prior.

    Args:
        name: The model's name; its entry in `REFERENCES` runs where there is one.

    Returns:
        The method, the moments, and by how many independent draws they are known.
    """
    case, reference = MODELS[name](), REFERENCES.get(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        if reference is not None and reference.prior_draws:
            return weighted_prior(case, reference)
        return long_chains(case, reference)
    finally:
        torch.set_default_dtype(before)


def long_chains(case: Case, reference: Reference | None) -> dict[str, Any]:
    """Runs Pyro's NUTS on the reference, or on the model itself."""
    args = tuple(_double(value) for value in case.args)
    chains = [_chain(case, args, reference, seed) for seed in range(CHAINS)]
    values = {name: torch.stack([chain[name] for chain in chains]).numpy() for name in chains[0]}
    return {
        "method": "NUTS",
        "moments": {name: (float(v.mean()), float(v.std())) for name, v in values.items()},
        "least_ess": min(float(ess({name: v})[name]) for name, v in values.items()),
        "largest_rhat": max(float(rhat({name: v})[name]) for name, v in values.items()),
    }


def _chain(
    case: Case, args: tuple[Any, ...], reference: Reference | None, seed: int
) -> dict[str, Tensor]:
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    model = config_enumerate(case.model) if reference is None else reference.model
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True, target_accept_prob=0.9)
    mcmc = MCMC(kernel, CHAIN_DRAWS, WARMUP, disable_progbar=True)
    mcmc.run(*args)
    draws = mcmc.get_samples()
    if reference is not None:
        draws |= Predictive(model, draws)(*args)
    return scalars_of(case, draws)


def weighted_prior(case: Case, reference: Reference) -> dict[str, Any]:
    """Draws the prior of a reference, whose sites are independent a priori, and weights the draws
    by their likelihood."""
    args = tuple(_double(value) for value in case.args)
    pyro.set_rng_seed(0)
    nodes = poutine.trace(reference.model).get_trace(*args).nodes.values()
    priors = {
        node["name"]: node["fn"]
        for node in nodes
        if node["type"] == "sample" and not node["is_observed"]
    }

    def log_likelihood(latents: dict[str, Tensor]) -> Tensor:
        known = poutine.block(poutine.condition(reference.model, latents), hide=list(latents))
        return poutine.trace(known).get_trace(*args).log_prob_sum()

    parts = []
    with pyro.validation_enabled(False):
        for rows in torch.arange(reference.prior_draws).split(PRIOR_CHUNK):
            draws = {name: prior.sample(rows.shape) for name, prior in priors.items()}
            parts.append({**scalars_of(case, draws), "": torch.vmap(log_likelihood)(draws)})
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    weights = values.pop("").softmax(0)
    means = {name: weights @ v for name, v in values.items()}
    variances = {name: weights @ (v - means[name]).square() for name, v in values.items()}
    return {
        "method": "weighted draws of the prior",
        "moments": {name: (float(means[name]), float(variances[name]) ** 0.5) for name in values},
        "least_ess": 1.0 / float(weights.square().sum()),
        "largest_rhat": 1.0,
    }


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def read_references() -> dict[str, Any]:
    """The stored moments of long chains by model."""
    return json.loads(REFERENCE.read_text()) if REFERENCE.exists() else {}


def right_moments(name: str, references: dict[str, Any]) -> Moments:
    """The right numbers of a model: of its closed form, or of long chains; empty without either."""
    exact = MODELS[name]().exact
    stored = references.get(name, {"moments": {}})["moments"]
    return exact or {key: (mean, sd) for key, (mean, sd) in stored.items()}


def run_references(names: Sequence[str]) -> None:
    """Runs the references of models without a closed form, and stores those that have mixed."""
    for name in names:
        if MODELS[name]().exact:
            continue
        start = time.perf_counter()
        found = long_run(name)
        mixed = found["least_ess"] >= LEAST_ESS and found["largest_rhat"] <= LARGEST_RHAT
        if mixed:
            references = read_references() | {name: found}
            REFERENCE.write_text(json.dumps(references, indent=1) + "\n")
        print(
            f"{name}: ess {found['least_ess']:.0f}, rhat {found['largest_rhat']:.3f}, "
            f"{time.perf_counter() - start:.0f} s{'' if mixed else ', not stored'}",
            flush=True,
        )


# The table


def table(rows: Sequence[Row]) -> str:
    """Formats rows as a table, medians over the seeds of a model."""
    lines = [
        f"{'model':22} {'mode':9} {'size':>4} {'outcomes':28} {'mean err':>8} {'|log sd|':>8} "
        f"{'s':>6} {'late':>6}  rung"
    ]
    for name in dict.fromkeys(row.model for row in rows):
        group = [row for row in rows if row.model == name]
        outcomes = [row.outcome for row in group]
        counted = ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes))
        numbers = [
            statistics.median(getattr(row, field) for row in group)
            for field in ("mean_error", "log_sd_error", "seconds")
        ]
        first = group[0]
        lines.append(
            f"{name:22} {first.mode:9} {first.features:4d} {counted:28} {numbers[0]:8.3f} "
            f"{numbers[1]:8.3f} {numbers[2]:6.1f} {max(row.late for row in group):6.1f}  "
            f"{first.rung}"
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """One sentence on all models."""
    names = list(dict.fromkeys(row.model for row in rows))
    of = {name: [row.outcome for row in rows if row.model == name] for name in names}
    good = sum(all(o == "right" for o in outcomes) for outcomes in of.values())
    wrong = sum("WRONG" in outcomes for outcomes in of.values())
    failed = sum("failed" in outcomes for outcomes in of.values())
    return (
        f"{good} of {len(names)} models are trusted and right for every seed, {wrong} trusted and "
        f"wrong for some, {failed} fail for some."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all by default")
    parser.add_argument("--seeds", type=int, default=1, help="seeds per model")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds per fit")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--reference", action="store_true", help="run the long chains anew")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in MODELS]
    if unknown:
        parser.error(f"Expected names among {', '.join(MODELS)}; got {', '.join(unknown)}.")
    names = options.names or list(MODELS)
    if options.reference:
        run_references(names)
        return
    references = read_references()
    rows = []
    for name in names:
        right = right_moments(name, references)
        for seed in range(options.seeds):
            rows.append(run_row(name, seed, options.time_limit, right))
            print(f"{name}, seed {seed}: {rows[-1].outcome}. {rows[-1].sentence}", flush=True)
    print(table(rows), summary(rows), sep="\n\n")
    if options.json is not None:
        content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
