"""Masked networks, whose every output sees only the inputs that it may depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_activation, check_hidden, check_size

__all__ = ["MADE", "Weights"]


class Weights(NamedTuple):
    """The masked matrices of a network, the first ``None`` where no input is seen, the biases, and the context's matrix."""

    matrices: list[Tensor | None]
    biases: list[Tensor]
    context: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All of them in a row."""
        return [t for t in (*self.matrices, *self.biases, self.context) if t is not None]


class MADE(nn.Module):
    r"""A network that gives each entry of a vector parameters which depend on some of the other entries alone.

    Entry :math:`i` has a set :math:`A_i` of entries that it may depend on: those before it in an
    order, or its parents in a graph without cycles. Every hidden unit belongs to one of these sets,
    sees inputs within its set and hidden units whose sets are subsets of its own, and is seen by
    the outputs whose set contains its own:

    .. math:: h_1 = a((W_0 \odot M_0)\, x + V c + b_0), \quad h_{k+1} = a((W_k \odot M_k)\, h_k + b_k), \quad
        \mathrm{out} = ((W_K \odot M_K)\, h_K + b_K) / \sqrt{n_K},

    so that :math:`\partial\,\mathrm{out}_i / \partial x_j = 0` unless :math:`j \in A_i`. All
    outputs see the context :math:`c`, through hidden units of their own where :math:`A_i` is empty.
    With ``residual`` a hidden layer adds to what went into the one before it,
    :math:`z_{k+1} = z_k + W_k\, a(z_k) + b_k`.

    The sets of an order share the units of a layer evenly. In a layer with fewer units than sets
    some are left out, and an entry does not see the last few before it.

    Args:
        features: Entries of the vector.
        parameters: Outputs per entry.
        hidden: Widths of the hidden layers, equal ones for a residual network.
        context_features: Entries of the context, or ``None``.
        activation: A callable without arguments that makes the activation module, which acts on
            each unit by itself.
        order: The entries from first to last; each may depend on those before it. Their natural
            order by default.
        residual: Whether hidden layers are residual.
        adjacency: Instead of an order a graph, as a boolean matrix of shape
            ``(features, features)``: entry ``i`` may depend on entry ``j`` where
            ``adjacency[i, j]``.
        codes: How many inputs stand for one entry, as the sine and cosine of an angle do; the first
            of every entry comes before the second.

    Raises:
        TypeError: If a size is not an integer, ``activation`` does not make modules, or
            ``adjacency`` is not boolean.
        ValueError: If a size is not positive, ``order`` is no permutation, ``adjacency`` has
            another shape, a cycle, or more distinct sets than a layer has units, both are given, or
            a residual network has layers of different widths.

    Reference:
        Germain, Gregor, Murray, Larochelle, "MADE: Masked autoencoder for distribution estimation",
        2015, https://arxiv.org/abs/1502.03509

        Wehenkel, Louppe, "Graphical normalizing flows", 2020, https://arxiv.org/abs/2006.02548

    Example:
        >>> net = MADE(3, 2, hidden=(8,), context_features=1, order=[2, 0, 1])
        >>> net(torch.zeros(5, 3), torch.zeros(1)).shape
        torch.Size([5, 2, 3])
    """

    adjacency: Tensor
    #: The entries stage by stage, and the place that each has there.
    entries: Tensor
    places: Tensor

    def __init__(
        self,
        features: int,
        parameters: int,
        hidden: Sequence[int] = (64, 64),
        context_features: int | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
        order: Sequence[int] | Tensor | None = None,
        residual: bool = False,
        adjacency: Tensor | Sequence[Sequence[bool]] | None = None,
        codes: int = 1,
    ) -> None:
        super().__init__()
        self.features = check_size("features", features)
        self.codes = check_size("codes", codes)
        self.outputs = check_size("parameters", parameters)
        widths = check_hidden(hidden)
        if context_features is not None:
            check_size("context_features", context_features)
        if residual and len(set(widths)) > 1:
            raise ValueError(f"Expected hidden of one width for a residual network; got {widths}.")
        if adjacency is None:
            graph = _chain(check_order(order, features))
        elif order is None:
            graph = _check_adjacency(adjacency, features)
        else:
            raise ValueError("Expected order or adjacency, for an order is a graph; got both.")
        self.activation = check_activation(activation)
        self.residual = bool(residual)
        sees_inputs = bool(graph.any())
        if not sees_inputs and context_features is None:
            widths = ()  # nothing to read
        self.widths = widths
        sizes = (*widths, self.outputs * features)
        self.output_scale = widths[-1] ** -0.5 if widths else 1.0
        self.context = (
            nn.Linear(context_features, sizes[0], bias=False)
            if context_features is not None
            else None
        )
        ins = (codes * features if sees_inputs else 0, *widths)
        self.layers = nn.ModuleList(_Masked(i, o) for i, o in zip(ins, sizes, strict=True))
        self.register_buffer("adjacency", torch.tensor(graph.tolist()))
        self._lay_out(graph, even=adjacency is None)
        for layer in self._masked():
            layer.start()
        self.register_load_state_dict_post_hook(_lay_out_again)

    def _lay_out(self, graph: Tensor, even: bool = True) -> None:
        """Gives the units their sets, and the layers their masks."""
        stages = _stages(graph)
        sets, degrees = _sets(graph, stages, self.context is not None)
        chosen = [_share(len(sets), width, even) for width in self.widths]
        seen = [sets[units] for units in chosen]
        masks = [_within(inner, outer) for inner, outer in pairwise(seen)]
        masks = [seen[0], *masks, _within(seen[-1], graph)] if seen else [graph]
        masks[-1] = masks[-1].repeat(self.outputs, 1)
        masks[0] = masks[0].repeat(1, self.codes)
        for layer, mask in zip(self._masked(), masks, strict=True):
            layer.set_mask(mask)
        #: How many entries there are up to each stage, and how many units of each layer are known before it.
        self.entry_ends = (0, *accumulate(map(len, stages)))
        self.unit_ends = tuple(
            tuple(int((degrees[units] <= stage).sum()) for stage in range(len(stages)))
            for units in chosen
        )
        entries = torch.tensor([i for stage in stages for i in stage], device=self.adjacency.device)
        self.register_buffer("entries", entries, persistent=False)
        self.register_buffer("places", entries.argsort(), persistent=False)

    @property
    def stages(self) -> int:
        """Length of the longest chain of entries of which each depends on the one before."""
        return len(self.entry_ends) - 1

    @property
    def slices(self) -> list[tuple[int, int]]:
        """Where in :attr:`entries` each stage begins and ends."""
        return list(pairwise(self.entry_ends))

    @property
    def size(self) -> int:
        """Number of weights that one evaluation multiplies by."""
        return sum(layer.weight.numel() for layer in self._masked() if layer.weight is not None)

    def _masked(self) -> Iterator[_Masked]:
        for layer in self.layers:
            assert isinstance(layer, _Masked)
            yield layer

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        """Makes the network constant: its last weights are set to zero and its last bias to ``values``.

        Args:
            values: Tensor of shape ``(parameters, features)``.
        """
        last: Any = self.layers[-1]
        if last.weight is not None:
            last.weight.zero_()
        if self.context is not None and len(self.layers) == 1:
            self.context.weight.zero_()
        last.bias.copy_(values.flatten() / self.output_scale)

    def weights(self) -> Weights:
        """The masked matrices and the biases, of which the last are scaled."""
        *hidden, (matrix, bias) = (layer.masked() for layer in self._masked())
        if matrix is not None and self.widths:
            matrix, bias = matrix * self.output_scale, bias * self.output_scale
        matrices, biases = zip(*hidden, (matrix, bias), strict=True)
        return Weights(
            list(matrices), list(biases), None if self.context is None else self.context.weight
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Evaluates the network.

        Args:
            x: Input of shape ``(*, codes * features)``.
            context: Context of shape ``(*, context_features)``, broadcast against ``x``.

        Returns:
            Output of shape ``(*, parameters, features)``.
        """
        return self.evaluate(x, context, self.weights())

    def evaluate(
        self,
        x: Tensor,
        context: Tensor | None,
        weights: Weights,
        trace: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """As :meth:`forward`, with weights at hand; notes what goes into each activation and what comes out of it."""
        (first, *matrices), (bias, *biases), of_context = weights
        if of_context is not None:
            z = F.linear(context, of_context, bias)  # type: ignore[arg-type]
            z = z if first is None else z + F.linear(x, first)
        else:
            z = F.linear(x, first, bias) if first is not None else bias.expand(*x.shape[:-1], -1)
        for number, (matrix, bias) in enumerate(zip(matrices, biases, strict=True), 1):
            h = self.activation(z)
            if trace is not None:
                trace.append((z, h))
            into = F.linear(h, matrix, bias)  # type: ignore[arg-type]
            z = z + into if self.residual and number < len(matrices) else into
        return z.unflatten(-1, (self.outputs, self.features))

    def extra_repr(self) -> str:
        return f"{self.features}, {self.outputs}, stages={self.stages}" + (
            ", residual=True" if self.residual else ""
        )


class _Masked(nn.Module):
    """A linear layer with a mask; one without inputs has a bias only."""

    mask: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features)) if in_features else None
        self.bias = nn.Parameter(torch.empty(out_features))

    def set_mask(self, mask: Tensor) -> None:
        if self.weight is not None:
            self.register_buffer("mask", mask.to(self.weight), persistent=False)

    @torch.no_grad()
    def start(self) -> None:
        """Draws weights as :class:`torch.nn.Linear` does, by the number of inputs that are seen."""
        if self.weight is None:
            self.bias.zero_()
            return
        bound = self.mask.sum(1).clamp(min=1.0).rsqrt()
        self.weight.uniform_(-1.0, 1.0).mul_(bound.unsqueeze(-1))
        self.bias.uniform_(-1.0, 1.0).mul_(bound)

    def masked(self) -> tuple[Tensor | None, Tensor]:
        return None if self.weight is None else self.weight * self.mask, self.bias

    def extra_repr(self) -> str:
        outs, ins = (len(self.bias), 0) if self.weight is None else self.weight.shape
        return f"in_features={ins}, out_features={outs}"


def _lay_out_again(net: MADE, _: Any) -> None:
    """After loading: the graph that was loaded may be another one."""
    if not net.adjacency.is_meta:
        net._lay_out(net.adjacency.cpu())


def check_order(order: Any, features: int, name: str = "order") -> list[int]:
    """Returns a permutation of ``0 .. features - 1``; the natural one where ``order`` is ``None``."""
    if order is None:
        return list(range(features))
    if isinstance(order, str) or not isinstance(order, (Sequence, Tensor)):
        raise TypeError(f"Expected {name} to be a sequence of integers; got {order!r}.")
    numbers = order.tolist() if isinstance(order, Tensor) else order
    given = [check_size(name, number, least=0) for number in numbers]
    if sorted(given) != list(range(features)):
        raise ValueError(f"Expected {name} to hold each of 0 .. {features - 1} once; got {given}.")
    return given


def _chain(order: list[int]) -> Tensor:
    """The graph in which every entry depends on all those before it."""
    place = torch.tensor(order, device="cpu").argsort()
    return place.unsqueeze(1) > place


def _check_adjacency(adjacency: Any, features: int) -> Tensor:
    try:
        graph = torch.as_tensor(adjacency, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"Expected adjacency to be a boolean matrix; got {adjacency!r}.") from None
    if graph.dtype != torch.bool:
        raise TypeError(f"Expected adjacency to be boolean; got {graph.dtype}.")
    if graph.shape != (features, features):
        raise ValueError(
            f"Expected adjacency of shape ({features}, {features}); got {tuple(graph.shape)}."
        )
    return graph


def _stages(graph: Tensor) -> list[list[int]]:
    """The entries, parted so that each depends on entries of earlier stages only.

    Raises:
        ValueError: If the graph has a cycle.
    """
    waits_for, placed = graph.sum(1), torch.zeros(len(graph), dtype=torch.bool, device="cpu")
    stages: list[list[int]] = []
    while not bool(placed.all()):
        ready = (waits_for == 0) & ~placed
        if not bool(ready.any()):
            raise ValueError(
                f"Expected adjacency without cycles; got one where {_cycle(graph, placed)}."
            )
        stages.append(ready.nonzero().flatten().tolist())
        placed |= ready
        waits_for -= graph[:, ready].sum(1)
    return stages


def _cycle(graph: Tensor, placed: Tensor) -> str:
    """Describes a cycle among the entries that cannot be placed, each of which depends on another such."""
    path = [int((~placed).nonzero()[0])]
    while path[-1] not in path[:-1]:
        path.append(int((graph[path[-1]] & ~placed).nonzero()[0]))
    return ", ".join(f"{i} depends on {j}" for i, j in pairwise(path[path.index(path[-1]) :]))


def _sets(graph: Tensor, stages: list[list[int]], with_empty: bool) -> tuple[Tensor, Tensor]:
    """The distinct sets that entries depend on, and the stage before which each is known, in the order of the latter."""
    stage_of = torch.empty(len(graph), dtype=torch.long, device="cpu")
    for number, stage in enumerate(stages):
        stage_of[stage] = number
    sets = torch.unique(graph, dim=0)
    degrees = (sets * (stage_of + 1)).amax(1)
    order = degrees.argsort(stable=True)
    order = order if with_empty else order[degrees[order] > 0]
    return sets[order], degrees[order]


def _share(sets: int, width: int, even: bool) -> Tensor:
    """The set of each unit of a layer, shared evenly and without going back."""
    if width < sets and not even:
        raise ValueError(
            f"Expected hidden of at least {sets}, one for each set that entries depend on in this adjacency; "
            f"got {width}."
        )
    return (2 * torch.arange(width, device="cpu") + 1) * sets // (2 * width)


def _within(inner: Tensor, outer: Tensor) -> Tensor:
    """Which of the inner sets are subsets of which outer ones, of shape ``(outer, inner)``."""
    return (outer.logical_not().float() @ inner.float().mT) == 0
