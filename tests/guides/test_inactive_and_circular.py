"""AutoFlow and other guides of models with masked entries and with angles."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import NeuTraReparam

import pyroflows as pf
from pyroflows.guides import as_guide
from pyroflows.model import LogDensity

SEEN = torch.tensor([True, False, True])


def masked() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("n", 3), poutine.mask(mask=SEEN):
        pyro.sample("x", dist.LogNormal(0.0, scale))


def angle() -> None:
    mu = pyro.sample("mu", dist.VonMises(math.pi, 0.1))
    pyro.sample("y", dist.VonMises(mu, 8.0), obs=torch.tensor(3.1))


def narrow(features: int) -> pf.Flow:
    return pf.RealNVP(features, transforms=2, network=pf.nn.mlp((8,)))


def test_the_guide_leaves_masked_entries_out() -> None:
    density, guide = LogDensity(masked), pf.AutoFlow(masked, flow=narrow)
    density.introduce(guide)
    assert guide.features == density.features == 3
    trace = poutine.trace(guide).get_trace()
    assert trace.nodes["x"]["value"].shape == (3,)
    # The log density of the sites is that of the active entries alone.
    values = {name: trace.nodes[name]["value"] for name in ("scale", "x")}
    z = density.unconstrain(values).unsqueeze(0)
    joint = density.log_prob(z) - guide.log_prob(z)
    replayed = poutine.trace(poutine.replay(masked, trace)).get_trace()
    ratio = replayed.log_prob_sum() - trace.log_prob_sum()
    torch.testing.assert_close(ratio, joint.squeeze(0), rtol=1e-4, atol=1e-4)


def test_training_particles_and_predictions_of_a_masked_model() -> None:
    guide = pf.AutoFlow(masked, flow=narrow)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
    svi = SVI(masked, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    assert all(math.isfinite(svi.step()) for _ in range(3))
    assert guide.median()["x"].shape == (3,)
    assert Predictive(masked, guide=guide, num_samples=5)()["x"].shape == (5, 3)


def test_neutra_takes_a_masked_model_and_refuses_an_angle() -> None:
    guide = pf.AutoFlow(masked, flow=narrow)
    guide()
    # The base of the guide is masked there, and needed all the same.
    assert LogDensity(NeuTraReparam(guide).reparam(masked)).features == 3
    of_angle = pf.AutoFlow(angle)
    of_angle()
    with pytest.raises(ValueError, match="NeuTraReparam takes for real numbers; got one with 'mu'"):
        of_angle.get_transform()


def test_the_density_gives_the_guide_its_cut_and_takes_it_over() -> None:
    density, guide = LogDensity(angle), pf.AutoFlow(angle)
    density.introduce(guide)
    assert torch.equal(guide.centres()["mu"], density.centres["mu"])
    assert bool(density.centres["mu"].abs() > 2.5)
    alone = pf.AutoFlow(angle)
    alone()
    assert float(alone.centres()["mu"]) == 0
    assert float(density.rotated(alone.centres()).centres["mu"]) == 0
    alone.load_state_dict(guide.state_dict())
    assert torch.equal(alone.centres()["mu"], density.centres["mu"])


def test_draws_of_angles_have_their_density() -> None:
    guide = pf.AutoFlow(angle)
    trace = poutine.trace(guide).get_trace()
    density = LogDensity(angle).rotated(guide.centres())
    z = density.unconstrain({"mu": trace.nodes["mu"]["value"]}).unsqueeze(0)
    replayed = poutine.trace(poutine.replay(angle, trace)).get_trace()
    ratio = replayed.log_prob_sum() - trace.log_prob_sum()
    expected = density.log_prob(z) - guide.log_prob(z)
    torch.testing.assert_close(ratio, expected.squeeze(0), rtol=1e-4, atol=1e-4)


def test_guides_that_take_angles_for_real_numbers_are_refused() -> None:
    def on_the_line() -> None:
        pyro.sample("mu", dist.Normal(3.1, 0.3))

    def on_the_circle() -> None:
        pyro.sample("mu", dist.VonMises(3.1, 8.0))

    density = LogDensity(angle)
    with pytest.raises(ValueError, match="puts them on the whole line"):
        as_guide(AutoNormal(angle), density)
    with pytest.raises(ValueError, match=r"distribution of angles at 'mu'.*got Normal"):
        as_guide(on_the_line, density)
    z, log_q = as_guide(on_the_circle, density).sample_and_log_prob(200)
    weights = (density.log_prob(z) - log_q).softmax(0)
    assert float(1 / weights.square().sum()) > 150


def test_guides_that_have_masked_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="3 unknown entries of the model; got one of 4"):
        as_guide(AutoMultivariateNormal(masked), LogDensity(masked))


def test_a_guide_of_independent_entries_leaves_masked_ones_out() -> None:
    density = LogDensity(masked)
    autoguide = AutoNormal(masked, init_scale=0.3)
    guide = as_guide(autoguide, density)
    z, log_q = guide.sample_and_log_prob(4)
    assert z.shape == (4, density.features)
    torch.testing.assert_close(guide.log_prob(z), log_q)
    loc = torch.cat(
        [autoguide.locs.scale_unconstrained.reshape(1), autoguide.locs.x_unconstrained[SEEN]]
    )
    expected = dist.Normal(loc, 0.3).log_prob(z).sum(-1)
    torch.testing.assert_close(log_q, expected)
