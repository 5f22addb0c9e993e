"""Parameters of a model, learned together with a guide."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.model import LogDensity, log_density_of
from pyroflows.train.learning import choose_parameters, learn_parameters

Y = torch.tensor([2.0, -1.0, 4.0, 0.5, 7.0, 3.0, 1.0, 5.5])


def hierarchy(y: Tensor) -> None:
    """y ~ N(mean, spread^2 + 1) with the latents integrated out."""
    mean = pyro.param("mean", torch.tensor(0.0))
    spread = pyro.param("spread", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(mean, spread))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


class Line(PyroModule):
    """A model with a network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(self.net(z).squeeze(-1), 1.0), obs=y)


def test_it_maximises_the_marginal_likelihood() -> None:
    density = LogDensity(hierarchy, (Y,), batch_size=32)
    guide = pf.AutoFlow(
        hierarchy, lambda n: pf.transforms.Elementwise(pf.univariate.Affine(), n), init_scale=0.5
    )
    density.introduce(guide)
    parameters = choose_parameters(density, True)
    learn_parameters(guide.flow, density, parameters, 500)
    mean, spread = pyro.param("mean"), pyro.param("spread")
    expected = float((Y.var(correction=0) - 1).sqrt())
    assert float(mean) == pytest.approx(float(Y.mean()), abs=0.1)
    assert float(spread) == pytest.approx(expected, rel=0.1)


def test_mini_batches_learn_too() -> None:
    def model(y: Tensor) -> None:
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y), subsample_size=20) as rows:
            pyro.sample("y", dist.Normal(z, noise), obs=y[rows])

    y = 3.0 * torch.randn(100)
    density = log_density_of(model, (y,))
    guide = pf.AutoFlow(density.full.continuous_model)
    density.full.introduce(guide)
    learn_parameters(guide.flow, density, choose_parameters(density.full, ["noise"]), 300)
    assert float(pyro.param("noise")) == pytest.approx(float(y.std()), rel=0.1)


def test_names_of_parameters_and_of_modules_choose() -> None:
    density = LogDensity(hierarchy, (Y,))
    assert list(choose_parameters(density, ["spread"])) == ["spread"]
    assert choose_parameters(density, False) == {}
    density = LogDensity(Line(), (Y,))
    assert sorted(choose_parameters(density, ["net"])) == ["net$$$bias", "net$$$weight"]


def held(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "an unknown name": (hierarchy, ["tau"], ValueError, "of the model, .*mean.*; got 'tau'"),
    "a word": (hierarchy, "spread", TypeError, "True, False or a sequence of names"),
    "a model without": (held, True, ValueError, "parameters that require gradients; got none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_the_training(case: str) -> None:
    model, learn, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        pf.fit_posterior(model, (Y,), learn=learn, progress=False)


def test_the_posterior_says_what_was_learned_and_the_rest_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="held at their present values.*: 'spread'. To learn them"):
        posterior = pf.fit_posterior(hierarchy, (Y,), learn=["mean"], steps=20, progress=False)
    assert list(posterior.learned) == ["mean"]
    assert torch.equal(posterior.learned["mean"], pyro.param("mean").detach())
    assert float(posterior.learned["mean"]) != 0.0
    assert float(pyro.param("spread")) == pytest.approx(1.0)
    assert "Parameters were learned: 'mean'." in repr(posterior)
