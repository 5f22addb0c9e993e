"""One call from a model to its posterior."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.util import get_rng_state, set_rng_seed, set_rng_state
from torch import Tensor
from tqdm.auto import tqdm

from .._checks import check_positive, check_size
from ..flows import Flow
from ..guides import AutoFlow
from ..guides.auto import flow_of_fit
from ..transforms import Compose, LowerTriangularAffine, Transform
from .gaussian import fit_gaussian
from .log_density import LogDensity, check_arguments
from .posterior import Posterior

__all__ = ["fit_posterior"]

PARTICLES = 256
STEPS = 2500
STEP_SIZE = 2e-2
# The whitening map moves all of the guide at once, so that it is stepped more carefully than the networks.
WHITENING_STEP_SIZE = 5e-3
WARM_UP = 20
GRADIENT_NORM = 10.0


def fit_posterior(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    guide: str | AutoFlow | Callable[[int], Any] = "auto",
    seed: int | None = 0,
    time_limit: float | None = None,
    progress: bool = True,
    device: str | torch.device | None = None,
    steps: int = STEPS,
) -> Posterior:
    r"""Fits a flow guide to a model and judges it.

    The model is captured as one batched log density, a Gaussian is fitted by Newton steps in whitened units, and a flow
    that starts from it is trained to maximise the ELBO

    .. math:: \mathcal{L}(\phi) = \mathbb{E}_{x \sim N(0, I)} [\log p(z, \mathrm{data}) - \log q_\phi(z)],
        \quad z = f_\phi(x),

    by its path gradient :math:`\mathbb{E}[(\nabla_z \log p - \nabla_z \log q)^\top \partial z / \partial \phi]`, whose
    variance vanishes at an exact guide, with Adam and a step size that decays to zero along a cosine.

    Discrete latent sites are summed out. Ctrl-C ends the training and returns the best posterior so far.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        guide: ``"auto"``; a preset such as ``pyroflows.RealNVP`` or any callable from the number of features to a flow; or
            an :class:`AutoFlow` of this model, which is trained on from where it is if it has been trained.
        seed: Seed of all that is random here; the same seed gives the same posterior. The random state outside is left as
            it was. ``None`` draws from that state.
        time_limit: Seconds of wall-clock time for the fit; the step size then decays with the time.
        progress: Whether to show a progress bar.
        device: Where to run: tensors in ``args`` and ``kwargs`` and a module model are moved there.
        steps: Gradient steps to take.

    Returns:
        The posterior, with its verdict.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the model cannot be fitted: it has no continuous latent site, its density is not finite where it
            starts, a latent changes its shape; or if the guide belongs to another model.

    Reference:
        Agrawal, Sheldon, Domke, "Advances in black-box VI: Normalizing flows, importance weighting, and optimization",
        2020, https://arxiv.org/abs/2006.10343

        Vaitl, Winkler, Richter, Kessel, "Fast and unified path gradient estimators for normalizing flows", 2024,
        https://arxiv.org/abs/2403.15881

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(x[0] * x[1], 1.0), obs=torch.tensor(1.0))
        >>> posterior = fit_posterior(model, steps=100, progress=False)
        >>> posterior.sample(10)["x"].shape
        torch.Size([10, 2])
    """
    if not callable(model):
        raise TypeError(f"Expected model to be a callable with Pyro statements; got {model!r}.")
    if time_limit is not None:
        time_limit = check_positive("time_limit", time_limit)
    check_size("steps", steps, least=0)
    start = time.perf_counter()
    args, kwargs = _on_device(device, model, *check_arguments(args, kwargs))
    with _seeded(seed):
        density = LogDensity(model, args, kwargs, batch_size=PARTICLES, device=device)
        auto, fresh = _make_guide(guide, density)
        history: list[Tensor] = []
        interrupted = False
        try:
            if fresh:
                gaussian = fit_gaussian(density, _finite_start(density))
                auto.whiten(gaussian.loc, gaussian.scale_tril)
            train(auto.flow, density, history, steps, time_limit, start, progress)
        except KeyboardInterrupt:
            interrupted = True
    elbos = torch.stack(history).tolist() if history else []
    return Posterior(auto, density, history=elbos, seconds=time.perf_counter() - start, interrupted=interrupted)


def train(
    flow: Flow,
    density: LogDensity,
    history: list[Tensor],
    steps: int,
    time_limit: float | None = None,
    start: float | None = None,
    progress: bool = False,
) -> None:
    """Maximises the ELBO of a flow whose last layer whitens, by path gradients; parameters change in place.

    Args:
        flow: The flow.
        density: What to fit.
        history: A list to which the ELBO of each step is appended.
        steps: Most steps to take.
        time_limit: Seconds since ``start`` at which to end, or ``None``.
        start: A reading of ``time.perf_counter``, now by default.
        progress: Whether to show a progress bar.
    """
    start = time.perf_counter() if start is None else start
    networks, whitening = list(flow.transform.layers[:-1]), flow.transform.layers[-1]
    assert isinstance(whitening, LowerTriangularAffine)
    # Steps in whitened units, z = mu + L (delta + M x): in its own units a step on L would depend on those of the model.
    adjustment = LowerTriangularAffine(density.features).to(density.initial)
    groups = [
        ([p for network in networks for p in network.parameters()], STEP_SIZE),
        (list(adjustment.parameters()), WHITENING_STEP_SIZE),
    ]
    trained = [p for parameters, _ in groups for p in parameters]
    optimizer = torch.optim.Adam(
        [{"params": parameters, "lr": peak, "peak": peak} for parameters, peak in groups],
        betas=(0.9, 0.99),
        fused=density.initial.device.type in ("cpu", "cuda"),
    )
    whitening.requires_grad_(False)
    stack = Compose([*networks, adjustment, whitening])  # type: ignore[list-item]
    base = flow().base_dist.expand((PARTICLES,))
    best = _Best(stack)
    try:
        with tqdm(total=steps, disable=not progress, desc="Fitting", leave=True) as bar:
            for step in range(steps):
                done = _fraction_done(step, steps, time_limit, start)
                if done >= 1:
                    break
                rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["peak"]
                optimizer.zero_grad()
                history.append(path_gradient(stack, base, density))
                norm = torch.nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
                if bool(norm.isfinite()):
                    optimizer.step()
                bar.update()
                if (step + 1) % 50 == 0:
                    elbo = float(torch.stack(history[-50:]).mean())
                    best.see(elbo)
                    bar.set_postfix_str(f"ELBO {elbo:.2f}")
    except KeyboardInterrupt:
        best.restore()
        raise
    finally:
        whitening.requires_grad_(True)
        delta, scale = adjustment.loc_and_scale_tril()
        loc, scale_tril = whitening.loc_and_scale_tril()
        whitening.set(loc + scale_tril @ delta, scale_tril @ scale)


def path_gradient(transform: Transform, base: Any, density: LogDensity) -> Tensor:
    """Adds the path gradient of the negative ELBO to the gradients of a transform's parameters.

    Args:
        transform: The transform from the base to the latent vector.
        base: The base, expanded to the number of particles.
        density: The log density.

    Returns:
        The ELBO, without gradient.
    """
    x = base.sample()
    point = x.requires_grad_()
    log_base = base.log_prob(point)
    (score,) = torch.autograd.grad(log_base.sum(), point)
    z, log_det, score = transform.push_score(x.detach(), score)
    with torch.no_grad():
        log_joint, slope = density.value_and_grad(z)
        finite = log_joint.isfinite() & slope.isfinite().all(-1)
        pull = torch.where(finite.unsqueeze(-1), score - slope, 0.0)
        log_weight = torch.where(finite, log_joint - log_base + log_det, 0.0)
    z.backward(pull / len(x))
    return log_weight.sum() / finite.sum()


class _Best:
    """The parameters with the best ELBO so far, kept for the case of an interruption."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.elbo = -math.inf
        self.state: dict[str, Tensor] = {}

    def see(self, elbo: float) -> None:
        if elbo > self.elbo:
            self.elbo = elbo
            self.state = {name: value.clone() for name, value in self.module.state_dict().items()}

    def restore(self) -> None:
        if self.state:
            self.module.load_state_dict(self.state)


def _fraction_done(step: int, steps: int, time_limit: float | None, start: float) -> float:
    by_steps = step / steps
    return by_steps if time_limit is None else max(by_steps, (time.perf_counter() - start) / time_limit)


def _make_guide(guide: Any, density: LogDensity) -> tuple[AutoFlow, bool]:
    """The guide, and whether it has yet to meet its model."""
    if isinstance(guide, AutoFlow):
        auto = guide
    elif guide == "auto" or (callable(guide) and not isinstance(guide, torch.nn.Module)):
        if isinstance(guide, type) and issubclass(guide, AutoFlow):
            auto = guide(density.continuous_model)
        else:
            auto = AutoFlow(density.continuous_model, flow=flow_of_fit if guide == "auto" else guide)
    else:
        got = f"a made {type(guide).__name__}" if isinstance(guide, torch.nn.Module) else repr(guide)
        raise TypeError(f"Expected guide to be 'auto', an AutoFlow, or a flow such as pyroflows.RealNVP; got {got}.")
    fresh = auto.prototype_trace is None
    if fresh:
        density.introduce(auto)
    nodes = list(auto.prototype_trace.iter_stochastic_nodes())
    of_guide = [(name, tuple(node["value"].shape)) for name, node in nodes]
    of_model = [(site.name, tuple(site.shape)) for site in density.sites]
    for name, node in nodes:
        if of_guide == of_model and not density.has_support(name, node["fn"].support):
            raise ValueError(f"Expected a guide of this model; got one in which {name!r} has support {node['fn'].support}.")
    if of_guide != of_model:
        raise ValueError(f"Expected a guide of this model, with latent sites {of_model}; got one with {of_guide}.")
    return auto, fresh


def _finite_start(density: LogDensity, tries: int = 256) -> Tensor:
    """The initial point, or the densest of some random ones where its density is not finite."""
    generator = torch.Generator().manual_seed(0)
    spread = 4 * torch.rand(tries, density.features, generator=generator, device="cpu") - 2
    for points in (density.initial.unsqueeze(0), spread.to(density.initial)):
        values, slopes = density.value_and_grad(points)
        usable = values.isfinite() & slopes.isfinite().all(-1)
        if bool(usable.any()):
            return points[values.masked_fill(~usable, -math.inf).argmax()]
    at_fault = [
        f"{name!r} gives {float(value):g}"
        for name, value in density.site_log_probs(density.initial).items()
        if not bool(value.isfinite())
    ]
    where = f"site {', site '.join(at_fault)}" if at_fault else "its gradient is not finite"
    raise ValueError(
        f"Expected a model with a finite log density where it starts; {where}. Look for NaN in the data, and for data "
        "outside of a support."
    )


def _on_device(
    device: str | torch.device | None, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if device is None:
        return args, kwargs
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"Expected device to be one of this machine; got {str(device)!r} ({error}).") from None
    if isinstance(model, torch.nn.Module):
        model.to(device)

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    if check_size("seed", seed, least=0) >= 2**32:
        raise ValueError(f"Expected seed < 2**32; got {seed}.")
    state = get_rng_state()
    with torch.random.fork_rng():
        set_rng_seed(seed)
        try:
            yield
        finally:
            set_rng_state(state)
