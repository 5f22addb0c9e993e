"""Networks of sets and of series."""

from __future__ import annotations

import pytest
import torch

from pyroflows.nn import DeepSet, SeriesNet


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
