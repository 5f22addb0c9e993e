"""vmap without a warning about its speed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from pyroflows._vmap import vmap


def unbatched(x: Tensor) -> Tensor:
    """An operation that torch has no batching rule for."""
    return torch.histc(x, 3)


def test_only_the_warning_about_speed_is_left_out() -> None:
    def warning(x: Tensor) -> Tensor:
        warnings.warn("of the model", stacklevel=1)
        return unbatched(x)

    points = torch.randn(4, 5)
    with pytest.warns(UserWarning, match="There is a performance drop"):
        torch.func.vmap(unbatched)(points)
    filters = list(warnings.filters)
    with pytest.warns(UserWarning, match="of the model") as told:
        vmap(warning)(points)
    assert [str(one.message) for one in told] == ["of the model"]
    assert warnings.filters == filters
