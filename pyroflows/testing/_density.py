"""Laws of the density: in Pyro's distributions, after a change, and over the whole space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..distributions.flow import sum_rightmost
from ..flows import Flow
from ..transforms import Transform
from ._case import ROUNDINGS, Case, LeftOut, bijection, per_point, transform_of, with_room
from ._law import law, near, require


@law("inverse_log_det", "context")
def pyro(case: Case) -> None:
    """In Pyro's distributions draws have the right shape and support, and densities are those of the change of
    variables, for draws and for other values, with one context and with a batch of them."""
    for batch in ((), (3,)):
        if batch and case.contexts is None:
            continue
        module, context = case.module(), case.batch(case.x, batch)[1]
        d = case.distribution(module, context)
        batch_of_context = () if context is None else (*batch, *[1] * len(case.batch_shape))
        wanted = torch.broadcast_shapes(batch_of_context, case.batch_shape)
        require(
            d.batch_shape == wanted,
            f"Expected a batch_shape of {tuple(wanted)}; got {tuple(d.batch_shape)}.",
        )
        event = case.values.shape[1:]
        require(
            d.event_shape == event,
            f"Expected an event_shape of {tuple(event)}; got {tuple(d.event_shape)}.",
        )
        drawn = d.rsample((4,))
        shape = (4, *d.batch_shape, *event)
        require(drawn.shape == shape, f"Expected draws of shape {shape}; got {tuple(drawn.shape)}.")
        require(
            d.support.check(drawn).all(), "Expected draws that satisfy the support; got others."
        )
        _scores(case, d, drawn, context)
    if not isinstance(case.pristine, Flow) and case.contexts is not None:
        t = transform_of(case.module())
        conditional = dist.ConditionalTransformedDistribution(case.base(), [t]).condition(
            case.contexts
        )
        n = len(case.contexts)
        expected = case.density_by_hand(case.module(), case.values, case.contexts)
        room = case.slack(case.density, case.values, case.contexts, torch.float64)[0]
        density = conditional.log_prob(case.values)
        require(
            density.shape == (n,),
            f"Expected densities given {n} contexts of shape {(n,)}; got {tuple(density.shape)}.",
        )
        near(
            density,
            expected,
            2 * room,
            "the conditional density to be that of the change of variables",
            case.values,
        )


def _scores(case: Case, d: Any, drawn: Tensor, context: Tensor | None) -> None:
    """The density of draws, remembered and not, beside the change of variables written out."""
    remembered, again = d.log_prob(drawn).detach(), d.log_prob(drawn.detach().clone()).detach()
    dims = (*drawn.shape[: drawn.dim() - len(case.values.shape[1:])],)
    require(
        remembered.shape == dims,
        f"Expected densities of shape {dims}; got {tuple(remembered.shape)}.",
    )
    flat = drawn.detach().reshape(-1, *case.values.shape[1:])
    context = with_room(context, case.context_dim, len(case.batch_shape))
    shape = case.transform.context_shape or ()
    given = None if context is None else context.expand(*dims, *shape)
    expected = case.density_by_hand(case.module(), drawn.detach(), given).detach()
    given = None if given is None else given.reshape(len(flat), *shape)
    room = case.slack(case.density, flat, given, torch.float64)[0]
    for what, density in (("a draw", remembered), ("a value", again)):
        near(
            density.reshape(-1),
            expected.reshape(-1),
            2 * room,
            f"log_prob of {what} to be that of the change of variables",
        )


@law("pyro", "copies")
def fresh(case: Case) -> None:
    """Nothing is stale: after an optimiser's step, or a write to the point, the same call gives the new value, and a
    fixed batch can be scored and differentiated twice, for a remembered density of old parameters goes unseen."""
    module, context = case.fresh(), case.batch(case.x, ())[1]
    once = case.distribution(module, context)
    x, y = case.x.clone(), case.values.clone()
    if case.batch_shape:
        y = once.sample((5,))
    t = transform_of(module)
    t = t if context is None else t.condition(context)

    def score(points: Tensor) -> Tensor:
        """A flow is called anew, for its base may be learned and is evaluated in the call."""
        return (case.distribution(module, context) if isinstance(module, Flow) else once).log_prob(
            points
        )

    for _ in range(2):
        density = score(y).sum()
        if density.requires_grad:
            density.backward()
    kept = [score(y), t(x), t.inv(case.y)]
    with torch.no_grad():
        kept += [score(y), t(x)]
    _step(module)
    _agrees(case, module, score, t, x, y, context, "an optimiser's step")
    with torch.no_grad():
        x.copy_(x.flip(0).clone())
        y.copy_(y.flip(0).clone())
    _agrees(case, module, score, t, x, y, context, "a write to the point")
    del kept


def _step(module: nn.Module) -> None:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if parameters:
        generator = torch.Generator().manual_seed(10)
        for parameter in parameters:
            parameter.grad = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
        torch.optim.SGD(parameters, lr=1e-2).step()


def _agrees(
    case: Case,
    module: Any,
    score: Callable[[Tensor], Tensor],
    t: Transform,
    x: Tensor,
    y: Tensor,
    context: Tensor | None,
    after: str,
) -> None:
    """Compares what is in use with a copy that was never used, loaded with the same state."""
    unused = case.fresh()
    unused.load_state_dict(module.state_dict())
    apart = case.distribution(unused, context)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            density, wanted = score(y), apart.log_prob(y.clone())
            image, log_det = case.forward(unused, x, context)
            mapped = t(x)
            slope = t.log_abs_det_jacobian(x, mapped)
        for what, one, two in (
            ("log_prob", density, wanted),
            ("the image", mapped, image),
            ("log_abs_det_jacobian", slope, log_det),
        ):
            room = (
                ROUNDINGS
                * case.rounding(torch.float64)
                * per_point(two.detach(), len(two)).clamp_min(1.0)
            )
            near(
                one.detach(),
                two.detach(),
                room,
                f"{what} to be that of the new state after {after}",
            )


@law("round_trip", "log_det")
def normalised(case: Case) -> None:
    """In one and two dimensions the density integrates to one over its support, by quadrature on a grid that draws
    lay out, for a map that does not reach the whole space loses mass without a sign."""
    constraint = case.density.constraint
    onto, event = bijection(constraint), case.values.shape[1:]
    free = None if onto is None else onto.inverse_shape(event)
    if free is None or free.numel() > 2:
        raise LeftOut("quadrature is for one and two dimensions")
    with torch.no_grad():
        d = case.distribution(case.module(), case.batch(case.x, ())[1])
        draws = onto.inv(d.sample((2000,)).reshape(-1, *event)).reshape(-1, free.numel())
        draws = draws[draws.isfinite().all(-1)]
        centre, root = _whitening(draws)

        def density(grid: Tensor) -> Tensor:
            """Of whitened coordinates."""
            z = centre + grid @ root.mT
            values = onto(z.reshape(-1, *free))
            seen = onto.inv(values).reshape(z.shape)
            # Near a border float64 cannot tell a value from it; what is lost there is as small.
            inside = ((seen - z).abs() <= 1e-3 * z.abs().clamp_min(1.0)).all(-1)
            slope = onto.log_abs_det_jacobian(z.reshape(-1, *free), values)
            log_prob = d.log_prob(with_room(values[inside], len(event), len(case.batch_shape)))
            found = torch.zeros(len(z), dtype=torch.float64)
            found[inside] = (
                log_prob.reshape(int(inside.sum()), -1)[:, 0]
                + sum_rightmost(slope, slope.dim() - 1)[inside]
            )
            return torch.where(inside, found.exp().nan_to_num(0.0), 0.0) * root.det().abs()

        total, error = _on_grids(density, free.numel())
        if not abs(total - 1) <= 1e-3 + error:
            total, error = _about_draws(
                density, torch.linalg.solve_triangular(root, (draws - centre).mT, upper=False).mT
            )
    if error > 0.1:
        raise LeftOut(f"quadrature did not settle on {total:.3g}")
    require(
        abs(total - 1) <= 1e-3 + error + case.accuracy,
        f"Expected a density that integrates to 1 over {constraint}; got {total:.5g}, by quadrature to within {error:.1e}.",
    )


def _on_grids(density: Callable[[Tensor], Tensor], dims: int) -> tuple[float, float]:
    """An integral on finer and finer grids, which a hyperbolic sine spreads, and how far the last two differ."""
    total = error = math.inf
    for n in (500, 1000, 2000, 4000, 16000) if dims == 1 else (48, 96, 192, 384):
        width = math.asinh(1e6 if dims == 1 else 1e4)
        w = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1) * width
        before, total = total, _integral(density, w.sinh(), w.cosh() * 2 * width / n, dims)
        error = abs(total - before)
        if error < 1e-4:
            break
    return total, error


def _about_draws(
    density: Callable[[Tensor], Tensor], draws: Tensor, n: int = 20_000
) -> tuple[float, float]:
    """An integral by weighted points about the draws, wherever these lie, and three of its standard errors.

    The points come from a mixture of normals, each shaped like the neighbourhood of a draw, and a Cauchy about all.
    """
    kernels, others = draws[:500], draws[500:]
    dims, n_near = draws.shape[-1], int(0.9 * n)
    nearest = torch.cdist(kernels, kernels).topk(16, largest=False).indices
    spread = (
        (kernels[nearest] - kernels.unsqueeze(1)).mT
        @ (kernels[nearest] - kernels.unsqueeze(1))
        / 16
    )
    roots = torch.linalg.cholesky(spread + 1e-20 * torch.eye(dims, dtype=draws.dtype))
    which = torch.randint(len(kernels), (n_near,))
    close = kernels[which] + (
        roots[which] @ torch.randn(n_near, dims, 1, dtype=draws.dtype)
    ).squeeze(-1)
    far = (
        torch.randn(n - n_near, dims, dtype=draws.dtype)
        / torch.randn(n - n_near, 1, dtype=draws.dtype).abs()
    )

    def proposal(points: Tensor) -> Tensor:
        whitened = roots.inverse().unsqueeze(1) @ (points - kernels.unsqueeze(1)).unsqueeze(-1)
        log_normal = (
            -0.5 * whitened.square().sum((-1, -2))
            - roots.logdet().unsqueeze(1)
            - dims / 2 * math.log(2 * math.pi)
        )
        normal = log_normal.logsumexp(0) - math.log(len(kernels) / 0.9)
        log_cauchy = math.lgamma((1 + dims) / 2) - (1 + dims) / 2 * (
            math.log(math.pi) + points.square().sum(-1).log1p()
        )
        return torch.logaddexp(normal, log_cauchy + math.log(0.1)).exp()

    weights = torch.cat(
        [density(part) / proposal(part) for part in torch.cat([close, far]).split(2000)]
    )
    # Where draws are much denser than the points are, a peak is missed, and the spread of the weights does not show it.
    missed = float((density(others) > 50 * proposal(others)).double().mean())
    return float(weights.mean()), 3 * float(weights.std()) / math.sqrt(n) + missed


def _integral(
    density: Callable[[Tensor], Tensor], side: Tensor, length: Tensor, dims: int
) -> float:
    grid, cells = (
        torch.cartesian_prod(*[part] * dims).reshape(-1, dims) for part in (side, length)
    )
    return float(density(grid) @ cells.prod(-1))


def _whitening(z: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of draws and a root of their spread, which no outlier moves far."""
    low, centre, high = z.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=z.dtype), dim=0)
    scale = ((high - low) / 3.29).clamp_min(1e-30)
    w = ((z - centre) / scale).clamp(-5, 5)
    covariance = w.mT @ w / len(w) + 1e-6 * torch.eye(len(scale), dtype=z.dtype)
    return centre, scale.unsqueeze(-1) * torch.linalg.cholesky(covariance)
