"""The traps that flows fall into in Pyro and torch, one test each, named after the trap."""

from __future__ import annotations

import copy
import functools
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoContinuous, AutoMessenger, AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor, nn
from torch.distributions import biject_to

import pyroflows as pf
from pyroflows.nn import mlp

NET: dict[str, Any] = {"network": mlp((8,))}
PRESET: dict[str, Any] = {"network": mlp((8,))}
TRANSFORMS: dict[str, Callable[..., pf.transforms.Transform]] = {
    "AdditiveCoupling": lambda c=None: pf.transforms.AdditiveCoupling(3, c, **NET),
    "AffineCoupling": lambda c=None: pf.transforms.AffineCoupling(3, c, **NET),
    "Elementwise": lambda c=None: pf.transforms.Elementwise(pf.univariate.Affine(), 3, c, **NET),
    "Rescale": lambda c=None: pf.transforms.Rescale(3, c, **NET),
    "LowerTriangularAffine": lambda c=None: pf.transforms.LowerTriangularAffine(3, c, **NET),
    "Compose": lambda c=None: pf.transforms.Compose(
        [
            pf.transforms.AffineCoupling(3, c, **NET),
            pf.transforms.Permute(3),
            pf.transforms.AffineCoupling(3, c, **NET),
        ]
    ),
    "Inverse": lambda c=None: pf.transforms.AffineCoupling(3, c, **NET).inv,
}
FLOWS: dict[str, Callable[..., pf.Flow]] = {
    "NICE": functools.partial(pf.NICE, 3, transforms=3, **PRESET),
    "RealNVP": functools.partial(pf.RealNVP, 3, transforms=3, **PRESET),
    "RealNVP on a support": functools.partial(
        pf.RealNVP, 3, transforms=3, support=constraints.positive, **PRESET
    ),
}

SMALL = functools.partial(pf.RealNVP, transforms=2, **PRESET)

every_transform = pytest.mark.parametrize("name", TRANSFORMS)
every_flow = pytest.mark.parametrize("name", FLOWS)


def moved(module: Any, scale: float = 0.5) -> Any:
    """The module at parameters that are far from the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def target() -> None:
    """A normalised model: its evidence is one."""
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))


def fit(
    model: Any, guide: Any, *args: Any, steps: int = 50, lr: float = 0.02, elbo: Any = None
) -> list[float]:
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": lr}),
        elbo or Trace_ELBO(num_particles=16, vectorize_particles=True),
    )
    return [svi.step(*args) for _ in range(steps)]


def likelihood(flow: pf.Flow) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow(), obs=x)

    return model


def nothing(*args: Any) -> None:
    """The guide of a model without latent sites."""


# ------------------------------------------------------------------------------- What Pyro's own get wrong, 1 to 12


@every_transform
def test_trap_1_log_det_is_off_at_perturbed_parameters(name: str) -> None:
    t = moved(TRANSFORMS[name]()).double()
    x = torch.randn(3, dtype=torch.double)
    _, log_det = t.forward_and_log_det(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: t.forward_and_log_det(x)[0], x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("name", ["NICE", "RealNVP"])
def test_trap_1_guide_reports_an_elbo_above_the_evidence(name: str) -> None:
    """Pyro's Sylvester guide reports +7.8 on a normalised target."""
    guide = pf.AutoFlow(target, flow=lambda n: FLOWS[name]())
    guide()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        moved(guide, 0.3)
        elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True)
        losses = torch.tensor([elbo.loss(target, guide) for _ in range(4)])
        assert float(losses.mean()) > -5 * float(losses.std()) / 2 - 1e-3


@every_flow
def test_trap_2_cache_backward_a_second_time(name: str) -> None:
    """The same full batch, step after step, without clear_cache()."""
    flow = moved(FLOWS[name]())
    x = flow().sample((20,))
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = -flow().log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > losses[1] > losses[2]
    d = flow()
    d.log_prob(x).sum().backward()
    d.log_prob(x).sum().backward()


@every_flow
def test_trap_2_cache_density_of_old_parameters(name: str) -> None:
    flow = moved(FLOWS[name]())
    d = flow()
    with torch.no_grad():
        x = d.sample((5,))
        before = d.log_prob(x)
        moved(flow)
        after = d.log_prob(x)
        torch.testing.assert_close(after, copy.deepcopy(flow)().log_prob(x.clone()))
    assert float((after - before).abs().min()) > 1e-6


@every_transform
def test_trap_2_cache_reaches_neither_inverses_nor_composed_transforms(name: str) -> None:
    t = moved(TRANSFORMS[name]())
    for each in (t, t.inv, pf.transforms.Compose([t, t.inv, t])):
        plain = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [each])
        x = plain.sample((4,))
        plain.log_prob(x).sum().backward()
        plain.log_prob(x).sum().backward()
        moved(t, 0.1)
        torch.testing.assert_close(plain.log_prob(x), plain.log_prob(x.clone()))


def test_trap_3_second_guide_is_never_trained() -> None:
    for _ in range(2):
        guide = pf.AutoFlow(
            target,
            flow=lambda n: FLOWS["RealNVP"](),
            init_loc_fn=init_to_value(values={"x": torch.ones(3)}),
        )
        losses = fit(target, guide)
        assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("mask", ["random", "half"])
def test_trap_4_param_store_does_not_restore(mask: str, tmp_path: Path) -> None:
    """Masks and permutations are no parameters, so a flow made again under another seed must have the same ones."""

    def make() -> pf.AutoFlow:
        def flow(n: int) -> pf.Flow:
            masks = pf.transforms.coupling_masks(mask, n, 2)
            return pf.Flow(
                [
                    pf.transforms.AffineCoupling(n, mask=masks[0]),
                    pf.transforms.Permute(n),
                    pf.transforms.AffineCoupling(n, mask=masks[1]),
                ]
            )

        return pf.AutoFlow(target, flow=flow)

    guide = make()
    fit(target, guide)
    pyro.get_param_store().save(tmp_path / "store")
    z = torch.randn(5, 3)
    expected = guide.get_posterior().log_prob(z)
    pyro.clear_param_store()
    pyro.set_rng_seed(123)
    pyro.get_param_store().load(tmp_path / "store")
    other = make()
    other()
    torch.testing.assert_close(other.get_posterior().log_prob(z), expected)


@every_flow
def test_trap_5_transform_is_built_lazily(name: str) -> None:
    flow = FLOWS[name]()
    assert len(list(flow.parameters())) > 0
    other = FLOWS[name]()
    other.load_state_dict(moved(flow).state_dict())
    x = flow().sample((2,))
    torch.testing.assert_close(other().log_prob(x), flow().log_prob(x))
    assert {p.dtype for p in FLOWS[name]().double().parameters()} == {torch.float64}
    assert FLOWS[name]().double()().sample().dtype == torch.float64
    assert {p.device.type for p in FLOWS[name]().to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize(
    "elbo", [JitTrace_ELBO, JitTraceGraph_ELBO, JitTraceEnum_ELBO], ids=lambda e: e.__name__
)
@pytest.mark.filterwarnings("ignore:.torch.jit.trace.:DeprecationWarning")
def test_trap_6_jit_elbo_dies(elbo: Any) -> None:
    options = {"strict_enumeration_warning": False} if elbo is JitTraceEnum_ELBO else {}
    guide = pf.AutoFlow(
        target,
        flow=lambda n: FLOWS["RealNVP"](),
        init_loc_fn=init_to_value(values={"x": torch.ones(3)}),
    )
    losses = fit(
        target,
        guide,
        elbo=elbo(ignore_jit_warnings=True, num_particles=8, vectorize_particles=True, **options),
    )
    assert losses[-1] < losses[0] - 1


def test_trap_7_no_initialisation() -> None:
    start = torch.tensor([3.0, -2.0, 0.5])
    guide = pf.AutoFlow(target, init_loc_fn=init_to_value(values={"x": start}), init_scale=1e-4)
    guide()
    draws = guide.get_posterior().sample((1000,))
    torch.testing.assert_close(draws.mean(0), start, atol=5e-5, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.full((3,), 1e-4), rtol=0.15, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sd", [1e-4, 1e4])
def test_trap_7_clamped_scales(sd: float) -> None:
    """Pyro's flows clamp log-scales to [-5, 3] and so give 1e-2 where 1e-4 is right."""

    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, sd).expand([2]).to_event(1))

    guide = pf.AutoFlow(
        model, flow=SMALL, init_loc_fn=init_to_value(values={"x": torch.zeros(2)}), init_scale=1.0
    )
    guide()
    # Scales alone are trained, for a step of Adam on a location would be as long as it is for a standard deviation of one.
    guide.requires_grad_(False)
    guide.flow.transform.layers[-1].log_diag.requires_grad_(True)
    # Gradients shrink by eight orders on the way, which Adam forgets in time only with a small beta.
    optim = pyro.optim.Adam({"lr": 0.1, "betas": (0.8, 0.8)})
    svi = SVI(model, guide, optim, Trace_ELBO(num_particles=16, vectorize_particles=True))
    for _ in range(400):
        svi.step()
    torch.testing.assert_close(
        guide.get_posterior().sample((4000,)).std(0), torch.full((2,), sd), rtol=0.1, atol=0
    )


@pytest.mark.parametrize("scale", ["softclip", "exp", "softplus", "sigmoid"])
def test_trap_7_straight_through_gradients(scale: str) -> None:
    """However far out a raw parameter is, its gradient is that of the function."""
    raw = torch.tensor(
        [[-9.0, -3.0, 0.1, 4.0, 9.0], [0.3] * 5], dtype=torch.double, requires_grad=True
    )
    x = torch.randn(5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(pf.univariate.Affine(scale).forward_and_log_det, (x, raw))


@every_transform
def test_trap_8_cannot_score_what_was_not_sampled(name: str) -> None:
    t = moved(TRANSFORMS[name]())
    for each in (t, t.inv):
        y = torch.randn(6, 3)
        torch.testing.assert_close(each(each.inv(y).clone()), y, atol=1e-4, rtol=1e-4)


def test_trap_8_inverse_is_no_module() -> None:
    inverse = pf.transforms.AffineCoupling(3, **NET).inv
    assert isinstance(inverse, nn.Module)
    assert len(list(inverse.parameters())) > 0
    flow = pf.Flow([pf.transforms.LowerTriangularAffine(3).inv, inverse])
    x = 2 + torch.randn(100, 3)
    losses = fit(likelihood(flow), nothing, x, elbo=Trace_ELBO())
    assert losses[-1] < losses[0] - 50
    assert len(pyro.get_param_store()) == len(list(flow.parameters()))


def test_trap_9_subsampled_latents_are_reused_for_other_mini_batches() -> None:
    def model() -> None:
        with pyro.plate("data", 10, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ValueError, match=r"'z' in plate 'data', .* use AutoAmortizedFlow, an amortised guide"
    ):
        pf.AutoFlow(model)()


def test_trap_10_mean_field_elbo_drops_the_log_density_of_deltas() -> None:
    def model() -> None:
        pyro.sample("x", dist.LogNormal(0.0, 1.0))

    guide = pf.AutoFlow(
        model, init_loc_fn=init_to_value(values={"x": torch.tensor(1.0)}), init_scale=1.0
    )
    for _ in range(3):
        assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("batch", [(), (4,), (5, 4)], ids=str)
def test_trap_11_batch_shape_ignores_the_context(batch: tuple[int, ...]) -> None:
    flow = moved(pf.RealNVP(3, context_features=2, transforms=2, **PRESET))
    context = torch.randn(*batch, 2)
    d = flow(context)
    assert (d.batch_shape, d.event_shape) == (batch, (3,))
    assert d.sample().shape == (*batch, 3)
    assert d.sample((7,)).shape == (7, *batch, 3)
    x = d.rsample((7,))
    assert d.log_prob(x.detach()).shape == (7, *batch)
    index = (0,) * len(batch)
    torch.testing.assert_close(
        d.log_prob(x.detach())[(0, *index)], flow(context[index]).log_prob(x[(0, *index)].detach())
    )


def test_trap_12_permute_is_no_module() -> None:
    permute = pf.transforms.Permute(5, seed=3)
    assert isinstance(permute, nn.Module)
    other = pf.transforms.Permute(5, seed=4)
    assert not torch.equal(other(torch.arange(5.0)), permute(torch.arange(5.0)))
    other.load_state_dict(permute.state_dict())
    assert torch.equal(other(torch.arange(5.0)), permute(torch.arange(5.0)))
    assert {b.device.type for b in permute.to("meta").buffers()} == {"meta"}


@every_transform
def test_trap_12_float32_round_trips_and_gradients(name: str) -> None:
    t = moved(TRANSFORMS[name]())
    x = torch.cat([torch.randn(50, 3), 100 * torch.randn(50, 3)])
    y, log_det = t.forward_and_log_det(x)
    back, inverse_log_det = t.inverse_and_log_det(y)
    torch.testing.assert_close(back, x, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=1e-2, rtol=1e-3)
    double = copy.deepcopy(t).double()
    torch.testing.assert_close(
        y.double(), double.forward_and_log_det(x.double())[0], atol=1e-2, rtol=1e-3
    )


# -------------------------------------------------------------------------------------- The protocol of a transform


@every_transform
def test_transform_trap_domains_and_event_dims(name: str) -> None:
    t = TRANSFORMS[name]()
    assert t.bijective
    assert (t.domain.event_dim, t.codomain.event_dim) == (1, 1)
    d = dist.TransformedDistribution(dist.Normal(torch.zeros(4, 3), 1.0).to_event(1), [t])
    assert (d.batch_shape, d.event_shape, d.support.event_dim) == ((4,), (3,), 1)
    assert biject_to(d.support)(torch.randn(3)).shape == (3,)
    assert d.log_prob(torch.zeros(4, 3)).shape == (4,)
    with pytest.raises(AttributeError, match="sign"):
        _ = t.sign


@every_flow
def test_transform_trap_support_of_a_flow_as_a_prior(name: str) -> None:
    flow = moved(FLOWS[name]())

    def model() -> None:
        pyro.sample("z", flow())

    d = flow()
    assert d.support.event_dim == 1
    assert bool(d.support.check(d.sample((10,))).all())
    assert bool(d.support.check(torch.full((3,), -1.0))) == ("support" not in name)
    guide = AutoNormal(model)
    assert math.isfinite(Trace_ELBO().loss(model, guide))
    assert bool(d.support.check(guide()["z"]).all())


@every_transform
@pytest.mark.parametrize("batch", [(), (0,), (1,), (4,), (2, 0, 3), (5, 4)], ids=str)
def test_transform_trap_log_det_shapes(name: str, batch: tuple[int, ...]) -> None:
    t = moved(TRANSFORMS[name]())
    x = torch.randn(*batch, 3)
    for given in (x, torch.randn(3, *batch).movedim(0, -1), torch.randn(3).expand(*batch, 3)):
        y = t(given)
        assert y.shape == given.shape
        assert t.log_abs_det_jacobian(given, y).shape == batch
        assert t.inverse_and_log_det(y)[1].shape == batch


@every_transform
def test_transform_trap_forward_and_inverse_shapes(name: str) -> None:
    t = TRANSFORMS[name](2).condition(torch.zeros(5, 1, 2))
    assert t.forward_shape(torch.Size([4, 3])) == t.inverse_shape(torch.Size([4, 3])) == (5, 4, 3)
    assert t(torch.zeros(4, 3)).shape == (5, 4, 3)


@every_transform
def test_transform_trap_inverse_shares_hashes_and_pickles(name: str) -> None:
    """torch's own inverse is unhashable, has no parameters, and pickles to nothing (pytorch #191197)."""
    t = moved(TRANSFORMS[name]())
    inverse = t.inv
    assert inverse.inv is t
    assert t.inv is inverse
    assert {id(p) for p in inverse.parameters()} == {id(p) for p in t.parameters()}
    assert len({t, inverse}) == 2
    y = torch.randn(4, 3)
    again = pickle.loads(pickle.dumps(inverse))
    torch.testing.assert_close(again(y), inverse(y))
    assert len(list(again.parameters())) == len(list(t.parameters()))


@every_transform
def test_transform_trap_reference_cycle_with_the_inverse(name: str) -> None:
    """Conditioned transforms made at each step must go at once, with all that they hold, not with the cyclic collector."""
    t = TRANSFORMS[name](2)
    gc.disable()
    try:
        conditioned = t.condition(torch.zeros(4, 2))
        _ = conditioned.inv
        y = conditioned(torch.randn(4, 3))
        conditioned.log_abs_det_jacobian(y, y)
        watch, held = weakref.ref(conditioned), weakref.ref(y)
        del conditioned, y, _
        assert watch() is None
        assert held() is None
    finally:
        gc.enable()


@every_flow
def test_transform_trap_activations_outlive_the_step(name: str) -> None:
    flow = FLOWS[name]()
    gc.disable()
    try:
        x = flow().rsample((10,))
        watch = weakref.ref(x)
        del x
        assert watch() is None
    finally:
        gc.enable()


@every_transform
def test_transform_trap_with_cache_and_hash(name: str) -> None:
    t = TRANSFORMS[name]()
    for size in (0, 1):
        assert {id(p) for p in t.with_cache(size).parameters()} == {id(p) for p in t.parameters()}
    assert t == t
    assert t != TRANSFORMS[name]()
    assert len(dict(nn.ModuleList([t, t.inv, TRANSFORMS[name]()]).named_modules())) > 3


@every_flow
def test_transform_trap_memory_travels_with_copies(name: str) -> None:
    """A small coupling once grew from 6 KB to 8 MB when it was saved after use."""
    flow = FLOWS[name]()
    sizes = []
    for use in (False, True):
        d = flow()
        x = d.rsample((20000,)) if use else None
        buffer = io.BytesIO()
        torch.save(flow, buffer)
        sizes.append(
            (buffer.tell(), len(pickle.dumps(flow)), len(pickle.dumps(copy.deepcopy(flow))))
        )
        del x
    for fresh, used in zip(*sizes, strict=True):
        assert used < fresh + 2000


@every_flow
def test_transform_trap_memory_of_a_changed_tensor(name: str) -> None:
    """What is remembered is forgotten once the sample, or a parameter, has been written to."""
    flow = moved(FLOWS[name]())
    d = flow()
    with torch.no_grad():
        x = d.sample((4,))
        x.mul_(1.5)
        torch.testing.assert_close(d.log_prob(x), d.log_prob(x.clone()))
        x = d.sample((4,))
        flow.load_state_dict(moved(copy.deepcopy(flow)).state_dict())
        torch.testing.assert_close(d.log_prob(x), d.log_prob(x.clone()))


def test_transform_trap_inference_mode() -> None:
    flow = moved(FLOWS["RealNVP"]())
    with torch.inference_mode():
        d = flow()
        x = d.sample((4,))
        before = d.log_prob(x)
        x.add_(1.0)
        torch.testing.assert_close(d.log_prob(x), d.log_prob(x.clone()))
        assert not torch.allclose(d.log_prob(x), before)


@every_flow
def test_transform_trap_sample_then_score_has_its_gradient(name: str) -> None:
    """pytorch #59822: with a cache, the score of a fresh sample had a wrong gradient or none."""
    flow = moved(FLOWS[name]())
    d = flow()
    x = d.sample((6,))
    got = torch.autograd.grad(d.log_prob(x).sum(), list(flow.parameters()), allow_unused=True)
    want = torch.autograd.grad(
        flow().log_prob(x.clone()).sum(), list(flow.parameters()), allow_unused=True
    )
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w)


@every_flow
def test_transform_trap_scratch_tensors_and_synchronisation(name: str) -> None:
    """On the meta device a tensor made elsewhere fails, and so does reading a value."""
    flow = FLOWS[name]().to("meta")
    x, log_prob = flow().rsample_and_log_prob((5,))
    assert (x.device.type, log_prob.device.type) == ("meta", "meta")
    with pyro.validation_enabled(False):
        assert flow().expand([4]).log_prob(torch.ones(4, 3, device="meta")).device.type == "meta"
    for dtype in (torch.float32, torch.float64):
        assert FLOWS[name]().to(dtype)().sample((2,)).dtype == dtype


@every_transform
def test_transform_trap_a_part_that_is_neither_parameter_nor_buffer(name: str) -> None:
    """The state alone defines the function."""
    t, other = moved(TRANSFORMS[name]()), moved(TRANSFORMS[name]())
    x = torch.randn(4, 3)
    other.load_state_dict(t.state_dict())
    torch.testing.assert_close(other(x), t(x))


# ------------------------------------------------------------------------------------------ The protocol of a guide


def test_guide_trap_no_autocontinuous() -> None:
    guide = pf.AutoFlow(target)
    assert isinstance(guide, AutoContinuous)
    guide()
    reparam = NeuTraReparam(guide)
    poutine.trace(reparam.reparam(target)).get_trace()
    assert reparam.transform is guide.get_transform()


def test_guide_trap_default_dtype() -> None:
    """A float64 model under a float32 default."""
    guide = pf.AutoFlow(
        lambda: pyro.sample("x", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    )
    assert guide()["x"].dtype == torch.float64
    assert guide.median()["x"].dtype == torch.float64


def test_guide_trap_deepcopy_takes_the_model_away() -> None:
    """Pyro's autoguides forget their model when they are copied or pickled."""
    guide = pf.AutoFlow(target)
    fit(target, guide, steps=1)
    copy.deepcopy(guide)
    pickle.dumps(guide)
    assert guide.model is not None
    fit(target, guide, steps=1)


def test_guide_trap_median_and_quantiles_are_those_of_a_normal() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    skewed = pf.Flow([pf.transforms.AffineCoupling(2, mask=[True, False], **NET)])
    with torch.no_grad():
        skewed.transform.layers[0].conditioner.layers[-1].weight.normal_(std=3.0)
    guide = pf.AutoFlow(model, flow=lambda n: skewed, init_scale=1.0)
    guide()
    draws = guide.get_posterior().sample((50000,))
    levels = torch.tensor([0.05, 0.5, 0.95])
    error = 5 * math.sqrt(0.25 / 10000)
    for level, quantile in zip(levels, guide.quantiles(levels)["x"], strict=True):
        assert ((draws < quantile).float().mean(0) - level).abs().max() < error


def test_guide_trap_total_gradient() -> None:
    """``Trace_ELBO`` takes the slot of ``score_parts``; at the exact posterior the path gradient there is zero."""
    guide = pf.AutoFlow(
        target, init_loc_fn=init_to_value(values={"x": torch.zeros(3)}), init_scale=1.0
    )
    Trace_ELBO().loss_and_grads(target, guide)
    assert max(float(p.grad.abs().max()) for p in guide.parameters() if p.grad is not None) < 1e-5


def test_guide_trap_transforms_that_are_no_modules() -> None:
    guide = pf.AutoFlow(target, flow=lambda n: dist.transforms.TanhTransform())
    with pytest.raises(
        TypeError, match=r"Expected flow\(features\) to return a Flow or a Transform"
    ):
        guide()


class Amortised(AutoMessenger):
    """Local latents whose posterior a flow reads off the data."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, amortized_plates=("data",))
        self.flow = pf.RealNVP(2, context_features=2, transforms=2, **PRESET)

    def get_posterior(self, name: str, prior: Any) -> Any:
        (x,), _ = self.args_kwargs
        return self.flow(pyro.subsample(x, event_dim=1))


def test_guide_trap_amortised_messenger() -> None:
    x = torch.randn(20, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=5):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=pyro.subsample(x, event_dim=1))

    guide = Amortised(model)
    losses = fit(model, guide, x, elbo=Trace_ELBO(), steps=150)
    assert sum(losses[-30:]) < sum(losses[:30])
    trace = poutine.trace(guide).get_trace(x)
    assert trace.nodes["z"]["value"].shape == (5, 2)
    assert isinstance(trace.nodes["z"]["fn"], pf.distributions.FlowDistribution)
