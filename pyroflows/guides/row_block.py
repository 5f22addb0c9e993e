"""A conditional flow over the latent sites of each row of a plate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.nn import PyroModule
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.distributions import biject_to

from .._checks import call_factory
from .._wording import unstopped
from ..distributions import FlowDistribution
from ..flows import Flow, RealNVP
from ..flows.flow import register_parameters
from ..model.rehearsal import frame_of, observed_rows, rows_of
from ..model.sites import sample_nodes
from ..nn import Network, RowEncoder, RowSource, RowTable, mlp
from ..transforms import Elementwise, Transform
from ..univariate import Affine, RationalQuadraticSpline

__all__ = [
    "Encoding",
    "LocalSite",
    "MakeFlow",
    "RowBlock",
    "RowReader",
    "Rows",
    "amortized_flow",
    "make_encoder",
    "plates_of",
]

#: Makes a flow of (features, context_features).
MakeFlow = Callable[[int, int], "Flow | Transform"]
#: Bound on the log-scales of the affine map, without which a mini-batch may send them far off.
BOUND = 6.0


class Rows(NamedTuple):
    """The rows of a plate that one run sees.

    Attributes:
        plate: The name of the plate.
        dim: Its dimension, from the right.
        size: How many rows it sees.
        full_size: How many it has.
        indices: Which it sees; ``None`` where the plate has no index.
    """

    plate: str
    dim: int
    size: int
    full_size: int
    indices: Tensor | None

    @classmethod
    def seen(cls, trace: Any, node: Mapping[str, Any], plate: str) -> Rows:
        """The rows of the plate around a sample statement.

        Raises:
            ValueError: If an index is out of the plate's range.
        """
        frame = frame_of(dict(node), plate)
        full_size = frame.full_size or frame.size
        index = trace.nodes[plate]["value"] if plate in trace.nodes else None
        index = None if index is None else torch.as_tensor(index)
        _check_index(index, plate, full_size)
        return cls(plate, frame.dim, frame.size, full_size, index)


def _check_index(index: Tensor | None, plate: str, size: int) -> None:
    # Reading them would wait for a device, and a traced run has no values.
    if index is None or index.device.type != "cpu" or torch.jit.is_tracing() or not len(index):
        return
    least, most = int(index.min()), int(index.max())
    if least < 0 or most >= size:
        raise ValueError(
            f"Expected rows of plate {plate!r} between 0 and {size - 1}; got "
            f"{least if least < 0 else most}."
        )


class LocalSite(NamedTuple):
    """A latent site of each row.

    Attributes:
        name: The name of the sample statement.
        rest: The shape of one row's unconstrained value.
        axis: Where the rows stand in it.
        batch_dim: How many batch dimensions the site has.
    """

    name: str
    rest: torch.Size
    axis: int
    batch_dim: int

    @classmethod
    def of(cls, name: str, node: Mapping[str, Any], plate: str) -> LocalSite:
        """Reads a site from the node of a trace."""
        fn = node["fn"]
        shape = biject_to(fn.support).inverse_shape(fn.shape())
        batch_dim = len(fn.batch_shape)
        axis = batch_dim + frame_of(dict(node), plate).dim
        return cls(name, shape[:axis] + shape[axis + 1 :], axis, batch_dim)

    @property
    def features(self) -> int:
        """Entries of one row."""
        return self.rest.numel()

    def arrange(self, part: Tensor, rows: int) -> Tensor:
        """Gives the entries of rows the shape of the site.

        Args:
            part: Tensor of shape ``(*batch, features)``, whose batch has the dimension of the
                plate, and those of draws in front.
            rows: How many rows there are.

        Returns:
            Tensor of shape ``(*draws, *unconstrained_shape)``.
        """
        batch = part.shape[:-1]
        draws = batch[: max(len(batch) - self.batch_dim, 0)]
        return part.reshape(*draws, rows, *self.rest).movedim(len(draws), len(draws) + self.axis)


class RowReader:
    """Reads the data of rows from a rehearsal of the model and from its arguments.

    Without a callable of the user's these are the values of all sites that are observed inside of
    the plate, each with its mask if it has one, and the arguments of the model with a row for each
    of the plate that are not among them, such as covariates.

    Args:
        data: A callable with the arguments of the model that gives a tensor, or several.
        encodes: Whether data are read at all; else the indices of the rows are.
        like: A tensor of the dtype of what is read.
    """

    def __init__(self, data: Callable[..., Any] | None, encodes: bool, like: Tensor) -> None:
        self.data, self.encodes, self.like = data, encodes, like
        self.arguments: list[int | str] = []
        self.shared: list[int | str] = []

    def plan(self, trace: Any, args: Any, kwargs: Any, rows: Rows) -> list[RowSource]:
        """Decides which arguments to read, and describes all that is read of a row."""
        if not self.encodes or self.data is not None:
            made = self.read(trace, args, kwargs, rows) or []
            return [RowSource(f"tensor {k}", value.shape[1:]) for k, value in enumerate(made)]
        observed = list(_observed(trace, rows))
        if not observed:
            return []
        sources = [source for source, _ in observed]
        values = [value for _, value in observed]
        sets = {source.shape[: source.exchangeable] for source in sources if source.exchangeable}
        known = values if rows.indices is None else [*values, rows.indices]
        for key, value in _arguments(args, kwargs):
            given = rows_of(value, rows.full_size, rows.size, rows.indices)
            if given is not None and not any(_same(given, each) for each in known):
                self.arguments.append(key)
                sources.append(_describe(f"argument {key!r}", given.shape[1:], sets))
        for key, value in _arguments(args, kwargs):
            if key not in self.arguments and _is_shared(value, sets):
                self.shared.append(key)
                sources.append(_describe(f"argument {key!r}", value.shape, sets))
        return sources

    def read(self, trace: Any, args: Any, kwargs: Any, rows: Rows) -> list[Tensor] | None:
        """The data of the rows that a run sees, rows first; ``None`` where it has none.

        Raises:
            ValueError: If an argument that the first run had a row for each of the plate in no
                longer has.
        """
        if not self.encodes:
            return [torch.arange(rows.size) if rows.indices is None else rows.indices]
        if self.data is not None:
            made = self.data(*args, **kwargs)
            many = made if isinstance(made, (tuple, list)) else [made]
            read = [_check_rows("data(*args, **kwargs)", each, rows) for each in many]
            # Whole numbers may be what an encoder embeds.
            dtype = self.like.dtype
            return [each.to(dtype) if each.is_floating_point() else each for each in read]
        values = [value for _, value in _observed(trace, rows)]
        if not values:
            return None
        given = dict(_arguments(args, kwargs))
        for key in self.arguments:
            values.append(_check_rows(f"argument {key!r}", given.get(key), rows))
        for key in self.shared:
            values.append(given[key].expand(rows.size, *given[key].shape))
        return [value.to(self.like.dtype) for value in values]


def _observed(trace: Any, rows: Rows) -> Any:
    """What is observed of each row, with a description of each tensor."""
    for name, node in sample_nodes(trace):
        if not node["is_observed"] or frame_of(node, rows.plate) is None:
            continue
        if node["infer"].get("_deterministic") or not torch.as_tensor(node["value"]).numel():
            continue
        value, mask = observed_rows(node, rows.plate)
        others = value.dim() - 1 - node["fn"].event_dim
        exchangeable = others if value.shape[1 : 1 + others].numel() > 1 else 0
        series = node["fn"].event_dim == 2 and not exchangeable
        shape = value.shape[1:]
        yield RowSource(name, shape, exchangeable, series), value
        if mask is not None:
            yield RowSource(name, shape, exchangeable, series, mask=True), mask


def _arguments(args: Any, kwargs: Mapping[str, Any]) -> list[tuple[int | str, Any]]:
    return [*enumerate(args), *kwargs.items()]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their shapes."""
    if one.numel() != other.numel() or one.device != other.device:
        return False
    return bool((one.flatten() == other.flatten()).all())


def _describe(name: str, shape: torch.Size, sets: set[torch.Size]) -> RowSource:
    fitting = [len(each) for each in sets if shape[: len(each)] == each]
    return RowSource(name, shape, max(fitting, default=0))


def _is_shared(value: Any, sets: set[torch.Size]) -> bool:
    """Whether an argument has an entry for each observation of a row, the same for all rows."""
    return isinstance(value, Tensor) and any(value.shape[: len(each)] == each for each in sets)


def _check_rows(name: str, value: Any, rows: Rows) -> Tensor:
    found = rows_of(value, rows.full_size, rows.size, rows.indices)
    if found is None:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"Expected {name} with a row for each of the {rows.full_size} of plate "
            f"{rows.plate!r}, or for each of the {rows.size} that a run sees; got {got}."
        )
    return found


class Encoding(PyroModule):
    """An encoder whose parameters go into the param store as those of a flow do.

    Args:
        network: The encoder.
        plate: The plate whose rows it encodes.
    """

    def __init__(self, network: Any, plate: str) -> None:
        super().__init__()
        self.network = network if isinstance(network, nn.Module) else Function(network)
        self.plate = plate

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """Encodes rows in a guide; see :meth:`encode`."""
        if am_i_wrapped():
            register_parameters(self)
        return self.encode(values)

    def encode(self, values: Sequence[Tensor]) -> Tensor:
        """Encodes rows, from tensors with rows in front to ``(rows, features)``.

        Raises:
            TypeError: If the encoder cannot be called so.
            ValueError: If it gives another shape.
        """
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        name = type(self.network).__name__
        rows = len(values[0])
        try:
            result = self.network(*values)
        except (TypeError, RuntimeError, ValueError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TypeError(
                f"Expected encoder to take the rows of plate {self.plate!r}, of shape {shapes}; "
                f"got {name}, which raises {type(error).__name__}: {unstopped(line)}."
            ) from error
        good = isinstance(result, Tensor) and result.dim() == 2 and len(result) == rows
        if not good or not result.is_floating_point() or not result.shape[-1]:
            got: Any = type(result).__name__
            if isinstance(result, Tensor):
                whole = "" if result.is_floating_point() else f" of {result.dtype}"
                got = f"{tuple(result.shape)}{whole}"
            raise ValueError(
                f"Expected encoder to give ({rows}, features) for {rows} rows of plate "
                f"{self.plate!r}; got {got}."
            )
        return result

    def __getattr__(self, name: str) -> Any:
        # Pyro would register the network again whenever it is read in a guide.
        return nn.Module.__getattr__(self, name)


class Function(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        """Calls the function."""
        return self.function(*values)


class RowsGivenGlobals(FlowDistribution):
    r"""The distribution of rows given globals, of which an ELBO gets the path gradient.

    The score of the flow's parameters, :math:`\nabla_\phi \log q_\phi(x \mid \theta)` at a fixed
    :math:`x`, of mean zero given the globals :math:`\theta`, is left out: then no noise of the rows
    is left where the flow is right. What goes by the globals, which are draws as well, stays.

    Args:
        distribution: The distribution.
        fixed: The same distribution, without a graph of the globals.
    """

    def __init__(self, distribution: FlowDistribution, fixed: FlowDistribution) -> None:
        self.fixed = fixed
        super().__init__(distribution.base_dist, distribution.transform, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RowsGivenGlobals:
        new = self._get_checked_instance(RowsGivenGlobals, _instance)
        new.fixed = self.fixed
        super().expand(batch_shape, _instance=new)
        return new

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """The terms of Pyro's gradient estimators; the bounds that take them apart from the log
        density are those whose gradient may do without the score."""
        parts = super().score_parts(x, *args, **kwargs)
        if not torch.is_grad_enabled():
            return parts
        fixed = self.fixed.log_prob(x.detach())
        return parts._replace(entropy_term=parts.log_prob - fixed + fixed.detach())


class RowBlock(PyroModule):
    r"""The latent sites of each row of a plate, given the row's data and the globals.

    .. math:: u_i = m(c_i) + s(c_i) \odot f(x_i; c_i), \qquad c_i = (e(y_i), \theta).

    Args:
        plate: The name of the plate.
        sites: The latent sites of its rows.
        reader: Reads the data of rows.
        encoder: The encoder :math:`e`.
        flow: The flow :math:`f`, with the affine map after it.
        encoding_features: Entries of an encoding.
    """

    def __init__(
        self,
        plate: str,
        sites: Sequence[LocalSite],
        reader: RowReader,
        encoder: Encoding,
        flow: Flow,
        encoding_features: int,
    ) -> None:
        super().__init__()
        self.plate, self.sites, self.reader = plate, list(sites), reader
        self.encoder = encoder
        self.flow = flow
        self.centring = Centring(encoding_features, self.features)

    @property
    def features(self) -> int:
        """Latent entries of a row."""
        return sum(site.features for site in self.sites)

    @property
    def has_path_gradient(self) -> bool:
        """Whether draws are scored again for the path gradient, which a slow inverse forbids."""
        return self.flow.transform.fast == "both"

    def encode(self, values: Sequence[Tensor]) -> Tensor:
        """Encodes the data of rows, to shape ``(rows, features)``.

        Raises:
            ValueError: If a row has no parameters, or if the encoder gives another shape.
        """
        table = self.encoder.network
        if isinstance(table, RowTable):
            _check_index(values[0], self.plate, len(table.values))
        like = next(self.centring.parameters())
        return self.encoder(values).to(like.dtype)

    def distribution(self, encoding: Tensor, theta: Tensor, rows: Rows) -> FlowDistribution:
        """The distribution of the rows' entries.

        Args:
            encoding: Encodings of shape ``(rows, features)``.
            theta: Globals, whitened, of shape ``(*draws, globals)``.
            rows: The rows.

        Returns:
            A distribution of batch shape ``(*draws, rows, *1)``, with the rows in the plate's
            dimension.
        """
        distribution: FlowDistribution = self.flow(self._context(encoding, theta, rows))
        if not self.has_path_gradient:
            return distribution
        return RowsGivenGlobals(
            distribution, self.flow(self._context(encoding, theta.detach(), rows))
        )

    def _context(self, encoding: Tensor, theta: Tensor, rows: Rows) -> Tensor:
        placed = _in_dimension(encoding, rows.dim)
        batch = torch.broadcast_shapes(placed.shape[:-1], theta.shape[:-1])
        return torch.cat([each.expand(*batch, each.shape[-1]) for each in (placed, theta)], -1)

    def centre(self, encoding: Tensor, rows: Rows) -> dict[str, Tensor]:
        """How far the coordinates of each site stay where they are when its prior moves."""
        return self.split(_in_dimension(self.centring(encoding), rows.dim), rows)

    def split(self, latent: Tensor, rows: Rows) -> dict[str, Tensor]:
        """The coordinates of each site, in its shape, from entries of shape ``(*, features)``."""
        parts = latent.split([site.features for site in self.sites], -1)
        pairs = zip(self.sites, parts, strict=True)
        return {site.name: site.arrange(part, rows.size) for site, part in pairs}


class Centring(PyroModule):
    """Shares of centring, between 0 and 1 and at first a half, from encodings.

    Args:
        inputs: Entries of an encoding.
        outputs: Latent entries of a row.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, encoding: Tensor) -> Tensor:
        """From encodings of shape ``(rows, inputs)`` to ``(rows, outputs)``."""
        if am_i_wrapped():
            register_parameters(self)
        return self.linear(encoding).sigmoid()

    def __getattr__(self, name: str) -> Any:
        # Pyro would register the linear map again whenever it is read in a guide.
        return nn.Module.__getattr__(self, name)


def _in_dimension(values: Tensor, dim: int) -> Tensor:
    """Values of rows, ``(rows, features)``, with the rows in a plate's dimension."""
    return values.reshape(len(values), *(1,) * (-dim - 1), values.shape[-1])


def amortized_flow(make: MakeFlow | None, features: int, context: int, network: Network) -> Flow:
    """Makes a flow with a context, followed by an affine map that the context gives.

    Args:
        make: A callable from (features, context_features) to a flow or a transform.
        features: Entries of a row.
        context: Entries of the context.
        network: Reads the log-scales and shifts of the affine map from the context.

    Raises:
        TypeError: If it makes no flow.
        ValueError: If the flow has other sizes, or a support.
    """
    made = call_factory(
        "flow", make or default_flow, "pf.RealNVP is", features=features, context_features=context
    )
    if not isinstance(made, (Flow, Transform)):
        raise TypeError(
            "Expected flow(features, context_features) to return a Flow or a Transform; "
            f"got {made!r}."
        )
    got = tuple(made.event_shape), made.context_shape and tuple(made.context_shape)
    if got != ((features,), (context,)) or getattr(made, "support", None) is not None:
        raise ValueError(
            f"Expected a flow over the whole space with features={features} and "
            f"context_features={context}; got events of shape {got[0]} and contexts of shape "
            f"{got[1]}."
        )
    last = Elementwise(Affine(bound=BOUND), features, context, network=network)
    if isinstance(made, Transform):
        return Flow([made, last])
    return Flow([made.transform, last], made.given_base)


def default_flow(features: int, context_features: int) -> Flow | Transform:
    """Makes a small flow, which needs few rows to train."""
    if features == 1:
        return Elementwise(RationalQuadraticSpline(), 1, context_features, network=mlp((32,)))
    network = mlp((32, 32), nn.Tanh)
    return RealNVP(features, context_features, transforms=4, network=network, mixing=None)


def check_encoder(chosen: Any) -> None:
    """Raises ``TypeError`` unless ``chosen`` is what :func:`make_encoder` takes."""
    if isinstance(chosen, str) and chosen == "rows":
        return
    if isinstance(chosen, (str, type)) or not (chosen is None or callable(chosen)):
        raise TypeError(f"Expected encoder to be a module, 'rows' or None; got {chosen!r}.")


def make_encoder(chosen: Any, sources: Sequence[RowSource], rows: Rows, features: int) -> Any:
    """Makes the encoder of a plate from what the user has chosen.

    Args:
        chosen: A module or another callable; ``None`` for a :class:`pyroflows.nn.RowEncoder`;
            ``"rows"`` for a :class:`pyroflows.nn.RowTable` of log-scales and shifts.
        sources: What can be read of a row.
        rows: The rows.
        features: Latent entries of a row.

    Raises:
        TypeError: If ``chosen`` is no encoder.
        ValueError: If there is nothing to encode.
    """
    check_encoder(chosen)
    if isinstance(chosen, str):
        return RowTable(rows.full_size, 2 * features)
    if not sources:
        raise ValueError(
            f"Expected an observed site in plate {rows.plate!r}, whose data are encoded; got none. "
            "Give data=, a function of the arguments of the model that returns its rows, or use "
            "encoder='rows'."
        )
    return RowEncoder(sources) if chosen is None else chosen


def plates_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """The vectorised plates around a sample statement by name, the outermost first."""
    frames = (frame for frame in node["cond_indep_stack"] if frame.vectorized)
    return {frame.name: frame for frame in frames}
