"""Factories of networks, by which a transform is told which network to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import call_factory, check_activation, check_hidden, check_size
from .._wording import unstopped
from .convnet import ConvNet
from .mlp import MLP
from .resnet import ResNet
from .startable import Startable, StartAt

__all__ = ["Network", "convnet", "make_network", "mlp", "resnet"]

#: A factory of networks. Called with the sizes ``(inputs, outputs, context)``, the last ``None``
#: where there is no context beside the input, it makes a module, which is called as ``module(x)``
#: or as ``module(x, context)``:
#:
#: - for vectors ``x`` has the shape ``(*, inputs)``, the context ``(*, context)`` and the result
#:   ``(*, outputs)``;
#: - for images and series sizes count channels, and the shapes are ``(*, inputs, *positions)``,
#:   ``(*, context, *positions)`` and ``(*, outputs, *positions)``.
#:
#: Where a context is all that there is to read, it is the input. A module that is no
#: :class:`Startable` is followed by an affine map with scales of zero, so that a fresh transform
#: starts where it should; it gets ``x`` and the context with the same batch shape, and with one
#: batch dimension where there are positions. So ``lambda i, o, c: nn.Linear(i, o)`` is a network
#: for everything without a context beside the input.
Network = Callable[[int, int, "int | None"], nn.Module]


def mlp(hidden: Sequence[int] = (64, 64), activation: Callable[[], nn.Module] = nn.SiLU) -> Network:
    """Makes multilayer perceptrons, see :class:`MLP`.

    Args:
        hidden: Widths of the hidden layers.
        activation: A callable without arguments that makes the activation module.

    Returns:
        A network for vectors.

    Raises:
        TypeError: If a width is not an integer or ``activation`` does not make modules.
        ValueError: If a width is not positive.

    Example:
        >>> mlp(hidden=(8,))(3, 2, None)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    check_activation(activation)
    return partial(MLP, hidden=check_hidden(hidden), activation=activation)


def resnet(
    width: int = 64, blocks: int = 2, activation: Callable[[], nn.Module] = nn.SiLU
) -> Network:
    """Makes residual networks, see :class:`ResNet`.

    Args:
        width: Entries of each hidden layer.
        blocks: Number of residual blocks.
        activation: A callable without arguments that makes the activation module.

    Returns:
        A network for vectors.

    Raises:
        TypeError: If a size is not an integer or ``activation`` does not make modules.
        ValueError: If a size is not positive.

    Example:
        >>> resnet(width=8)(3, 2, None)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    check_activation(activation)
    check_size("width", width)
    check_size("blocks", blocks)
    return partial(ResNet, width=width, blocks=blocks, activation=activation)


def convnet(
    hidden: Sequence[int] = (32, 32),
    kernel: int = 3,
    activation: Callable[[], nn.Module] = nn.SiLU,
    dims: int = 2,
) -> Network:
    """Makes convolutional networks, see :class:`ConvNet`.

    Args:
        hidden: Channels of the hidden layers.
        kernel: Width of each convolution, an odd number.
        activation: A callable without arguments that makes the activation module.
        dims: Dimensions of the positions, 2 for images and 1 for series.

    Returns:
        A network for images, or for series.

    Raises:
        TypeError: If a size is not an integer or ``activation`` does not make modules.
        ValueError: If an option is out of its range.

    Example:
        >>> convnet(hidden=(8,))(3, 2, None)(torch.zeros(5, 3, 4, 4)).shape
        torch.Size([5, 2, 4, 4])
    """
    made = partial(ConvNet, hidden=hidden, kernel=kernel, activation=activation, dims=dims)
    made(1, 1, None)  # so that a mistake shows here
    return made


def make_network(
    network: Network,
    inputs: int,
    start: Tensor,
    context: int | None = None,
    positions: Sequence[int] = (),
) -> Startable:
    """Makes a network and lets it start at given outputs.

    Args:
        network: The factory.
        inputs: Entries of the input, or its channels.
        start: What the network gives at first, of shape ``(outputs,)``.
        context: Entries of a context beside the input, or its channels.
        positions: Shape of the positions that each channel has; empty for vectors.

    Returns:
        The network, which broadcasts batches.

    Raises:
        TypeError: If ``network`` is no factory of modules, or its module cannot be called as
            :data:`Network` says.
        ValueError: If the module gives another shape.
    """
    check_network(network)
    sizes = {"inputs": inputs, "outputs": len(start), "context": context}
    made = call_factory("network", network, "mlp() is", **sizes)
    if not isinstance(made, nn.Module):
        raise _no_network(network)
    module = made if isinstance(made, Startable) else StartAt(made, len(start), len(positions))
    _try_out(made, (inputs, len(start), context), positions)
    module.start_at(start)
    return module


def check_network(network: Any) -> None:
    """Raises ``TypeError`` unless ``network`` may be a factory: a callable, no module or class."""
    if not callable(network) or isinstance(network, (nn.Module, type)):
        raise _no_network(network)


def _no_network(network: Any) -> TypeError:
    return TypeError(
        "Expected network to make a module of (inputs, outputs, context), as mlp() does; "
        f"got {network!r}."
    )


def _try_out(
    module: nn.Module,
    sizes: tuple[int, int, int | None],
    positions: Sequence[int],
) -> None:
    """Demands that a new module can be called and gives what it should."""
    inputs, outputs, context = sizes
    like = next(module.parameters(), torch.empty(0))
    given = [
        torch.zeros(2, size, *positions, dtype=like.dtype, device=like.device)
        for size in (inputs, context)
        if size is not None
    ]
    beside = "" if context is None else f" and a context of shape {_shape(context, positions)}"
    wanted = (
        f"Expected network to make a module that takes x of shape {_shape(inputs, positions)}"
        f"{beside} and gives shape {_shape(outputs, positions)}; got {type(module).__name__}"
    )
    training = module.training
    try:
        with torch.no_grad():
            result = module.eval()(*given)
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else ""
        reason = f"which raises {type(error).__name__}: {unstopped(line)}"
        raise TypeError(f"{wanted}, {reason}.{_advice(positions, context)}") from error
    finally:
        module.train(training)
    if not isinstance(result, Tensor) or result.shape != (2, outputs, *positions):
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{wanted}, which gives {got} for two points.")


def _advice(positions: Sequence[int], context: int | None) -> str:
    if positions:
        dims = "" if len(positions) == 2 else f"dims={len(positions)}"
        return f" An event with positions takes convnet({dims})."
    return " A vector takes mlp() or resnet()." + (
        "" if context is None else " With a context, the module is called as module(x, context)."
    )


def _shape(size: int, positions: Sequence[int]) -> str:
    return "(" + ", ".join(["*", str(size), *map(str, positions)]) + ")"
