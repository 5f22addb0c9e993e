"""Networks of sets and of series."""

from __future__ import annotations

import math

import pytest
import torch

from pyroflows.nn import DeepSet, Entries, SeriesNet


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3)])
@pytest.mark.parametrize("kind", [DeepSet, SeriesNet])
def test_batches_are_kept(
    kind: type[DeepSet | SeriesNet], shape: tuple[int, ...], device: torch.device
) -> None:
    net = kind(shape, 3).to(device)
    x = torch.randn(2, 5, *shape, device=device)
    assert net(x).shape == (2, 5, 3)
    torch.testing.assert_close(net(x)[1, 2], net(x[1, 2].unsqueeze(0))[0])


def test_the_order_matters_to_a_series_and_not_to_a_set() -> None:
    x = torch.randn(4, 9, 2)
    of_set, of_series = DeepSet((9, 2), 3), SeriesNet((9, 2), 3)
    torch.testing.assert_close(of_set(x), of_set(x.flip(1)), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(of_series(x), of_series(x.flip(1)), rtol=1e-4, atol=1e-6)


def test_ranks_have_no_outliers_and_follow_the_order(device: torch.device) -> None:
    x = torch.randn(1000, 2, device=device) * torch.tensor([1.0, 100.0], device=device)
    entries = Entries((2,)).to(device)
    entries.fit(x)
    e = entries(x)
    assert e.shape == (1000, 4) and torch.equal(e[:, :2], x)
    ranks = e[x[:, 0].argsort(), 2]
    assert bool((ranks.diff() >= 0).all()) and abs(float(ranks.std()) - 1) < 0.05
    far = entries(torch.full((1, 2), 1e9, device=device))[0, 2:]
    torch.testing.assert_close(far, e[:, 2:].amax(0))


def test_ranks_of_a_logistic_parameter_are_the_parameter() -> None:
    u = torch.linspace(0.0, 1.0, 1001)
    entries = Entries(())
    entries.fit(u)
    torch.testing.assert_close(
        entries(u)[100:-100, 1] * math.pi / math.sqrt(3), u.logit()[100:-100], atol=0.03, rtol=0
    )


def test_ranks_of_what_never_varies_are_finite(device: torch.device) -> None:
    entries = Entries((1,)).to(device)
    entries.fit(torch.ones(50, 1, device=device))
    assert bool(entries(torch.tensor([[0.0], [1.0], [2.0]], device=device)).isfinite().all())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DeepSet((), 3), "shape with 1 dimension"),
        (lambda: DeepSet((3,), 0), "outputs >= 1"),
        (lambda: SeriesNet((3,), 3, kernel=4), "kernel to be odd; got 4"),
    ],
)
def test_bad_options_are_told(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()  # type: ignore[operator]
