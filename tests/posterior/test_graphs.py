"""Posteriors of models in which a prior or the data carry a graph of gradients."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyroflows as pf


def constrained() -> None:
    scale = pyro.param("scale", lambda: torch.tensor(2.0), constraint=constraints.positive)
    pyro.sample("x", dist.Normal(0.0, scale))


class Module(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor(2.0), constraint=constraints.positive)

    def forward(self) -> None:
        pyro.sample("x", dist.Normal(0.0, self.scale))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)

    def forward(self) -> None:
        pyro.module("network", self)
        pyro.sample("x", dist.Normal(self.inner(torch.ones(1))[0], 1.0))


def bounded() -> None:
    bound = torch.tensor(1.0, requires_grad=True).exp()
    pyro.sample("x", dist.Uniform(0.0, bound))


def of_data(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0).expand([3]).to_event(1), obs=y)


def recentred() -> None:
    with pyro.plate("n", 2):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(2))


MODELS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "pyro.param": lambda: (constrained, ()),
    "PyroParam": lambda: (Module(), ()),
    "network": lambda: (Network(), ()),
    "support": lambda: (bounded, ()),
    "data": lambda: (of_data, (torch.ones(3, requires_grad=True) * 2,)),
    "reparam": lambda: (poutine.reparam(recentred, config={"x": LocScaleReparam()}), ()),
}


@pytest.mark.parametrize("name", slow_but_for(["network", "data", "reparam"], MODELS))
def test_it_is_found_copied_saved_and_pickled(name: str, tmp_path: Path) -> None:
    model, args = MODELS[name]()
    posterior = pf.fit_posterior(model, args, steps=0, progress=False)
    draws = posterior.sample(5, seed=1)["x"]
    assert torch.equal(copy.deepcopy(posterior).sample(5, seed=1)["x"], draws)
    posterior.save(tmp_path / "posterior.pt")
    loaded = pf.load_posterior(tmp_path / "posterior.pt", model)
    assert torch.equal(loaded.sample(5, seed=1)["x"], draws)
    torch.save(posterior.guide, io.BytesIO())


def test_a_copy_of_a_guide_carries_no_graph_and_shares_no_number() -> None:
    posterior = pf.fit_posterior(constrained, steps=0, progress=False)
    before = posterior.sample(5, seed=1)["x"]
    guide = copy.deepcopy(posterior.guide)
    node = guide.prototype_trace.nodes["x"]
    assert not node["fn"].scale.requires_grad
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(1.0)
    assert torch.equal(posterior.sample(5, seed=1)["x"], before)
