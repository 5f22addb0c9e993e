"""The log joint density of a model as one function of one vector, evaluated for many vectors at a time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.enum import config_enumerate
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from .._checks import caller_level, check_size, check_tensor
from .._compat import build_guide, make_fx, unvalidated, validates, whole_plates
from .enumeration import enumerated_log_prob
from .start import init_to_median

__all__ = ["LatentSite", "LogDensity"]

# Rows of data times points that one evaluation of a model with subsampled plates takes, so that it fits into memory.
ROWS_AT_ONCE = 2**21


@dataclass(frozen=True)
class LatentSite:
    """A continuous latent site: its name, shapes, bijection from the reals, and the plates its dimensions belong to."""

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    transform: torch.distributions.Transform
    plates: tuple[str | None, ...]

    @property
    def features(self) -> int:
        """Entries of the site in the unconstrained vector."""
        return self.unconstrained_shape.numel()


class LogDensity:
    r"""The unconstrained log joint density of a model, :math:`\log p(g(z), \mathrm{data}) + \log|\det J_g(z)|`.

    The vector :math:`z` holds all continuous latent sites in the order of the model, each mapped to the reals by
    ``biject_to`` of its support, as Pyro's autoguides do. Discrete sites are summed out by enumeration. The model is
    batched by :func:`torch.func.vmap` and captured once as a graph of tensor operations, so that an evaluation costs
    mathematics and not effect handlers; the result is checked against single traces. A model that cannot be batched, for
    instance because it branches on a value, is evaluated one point at a time, with a warning that says so.

    Everything outside of the latent sites, such as data and parameters, is taken as it is when the density is made. A plate
    with a ``subsample_size`` sees all its rows here; see :class:`pyroflows.model.minibatch.MiniBatchDensity` for a
    density of some of them.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        init_loc_fn: Where the sites start; one of Pyro's initialisation functions.
        batch_size: How many vectors one captured evaluation takes.
        device: Where tensors that the model makes itself are put; torch's default device if ``None``.

    Attributes:
        features: Entries of :math:`z`.
        sites: The latent sites, in order.
        initial: The start, of shape ``(features,)``.
        subsampled: For each plate with a ``subsample_size`` how many rows it has, and how many a run of the model sees.
        mode: ``"captured"``, ``"vmap"`` or ``"loop"``.

    Raises:
        ValueError: If the model has no continuous latent site or has one in a subsampled plate, changes the shape of a site
            between runs, or draws random numbers outside of its sites.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> density = LogDensity(model)
        >>> density.log_prob(torch.zeros(3, 1))
        tensor([-0.9189, -0.9189, -0.9189])
    """

    #: Whether the data come from a loader, so that ``args`` is only its first batch.
    streamed = False

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        batch_size: int = 256,
        device: str | torch.device | None = None,
    ) -> None:
        self.args, self.kwargs = check_arguments(args, kwargs)
        self.batch_size = check_size("batch_size", batch_size)
        self.device = device
        self.model = self.model_of_batch = model
        first = self._prototype(init_loc_fn)
        self.subsampled = self._find_subsampled(first)
        if self.subsampled:
            self.model = WholePlates(model)
            rows = max(size for size, _ in self.subsampled.values())
            self.batch_size = max(1, min(self.batch_size, ROWS_AT_ONCE // rows))
            self._refuse_fixed_parts(init_loc_fn)
            first = self._prototype(init_loc_fn)
        self._refuse_part_of_the_data(first)
        _refuse_changing_shapes(first, self._prototype(init_loc_fn))
        self.sites = latent_sites(first)
        self.discrete = [name for name, site in _latent_nodes(first) if _is_discrete(site)]
        self.features = sum(site.features for site in self.sites)
        self._max_plate_nesting = max([0, *(-frame.dim for frame in _frames(first))])
        values = {site.name: first.nodes[site.name]["value"] for site in self.sites}
        self.initial = self.unconstrain({name: value.detach() for name, value in values.items()})
        self._refuse_moving_supports()
        self._evaluator = self._make_evaluator()
        if self.mode == "loop":
            warnings.warn(
                "This model cannot be evaluated for a batch of points, so its log density is evaluated one point at a time, "
                f"which is slow. What torch.func.vmap says: {self._evaluator.reason}",
                stacklevel=caller_level(),
            )

    def _make_evaluator(self) -> Evaluator:
        return Evaluator(self._single, self.initial, self.batch_size)

    @property
    def mode(self) -> str:
        """How points are evaluated: ``"captured"``, ``"vmap"`` or ``"loop"``."""
        return self._evaluator.mode

    @property
    def full(self) -> LogDensity:
        """The density over all data: this one."""
        return self

    @property
    def batched(self) -> bool:
        """Whether many points are evaluated at a time."""
        return self.mode != "loop"

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            Tensor of shape ``(*)``.

        Raises:
            ValueError: If the last dimension is not ``features``.
        """
        return self.value_and_grad(z)[0]

    @torch.no_grad()
    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log density and its gradient; neither carries a graph.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            Tensors of shape ``(*)`` and ``(*, features)``.

        Raises:
            ValueError: If the last dimension is not ``features``.
        """
        check_tensor("z", z, (self.features,))
        rows = z.detach().reshape(-1, self.features)
        if not len(rows):
            return z.new_zeros(z.shape[:-1]), torch.zeros_like(z)
        values, grads = self._evaluate(rows)
        return values.reshape(z.shape[:-1]), grads.reshape(z.shape)

    def _evaluate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._evaluator(rows)

    @property
    def continuous_model(self) -> Callable[..., Any]:
        """The model as a guide of its continuous sites sees it: without the discrete ones."""
        return poutine.block(self.model, hide=self.discrete) if self.discrete else self.model

    def introduce(self, guide: Any) -> None:
        """Runs a fresh autoguide once on the model's arguments, outside of all traces, so that it is built."""
        with self.on_device(), poutine.block():
            build_guide(guide, self.args, self.kwargs)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the model is run, so that what it makes is made on its device."""
        return contextlib.nullcontext() if self.device is None else torch.device(self.device)

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Maps vectors to values of the sites.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            For each site a tensor of shape ``(*, *site_shape)``.
        """
        return {site.name: value for site, _, value in self._unpack(z)}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Maps values of the sites, of shape ``(*, *site_shape)``, to vectors of shape ``(*, features)``."""
        parts = []
        for site in self.sites:
            value = values[site.name]
            batch = value.shape[: value.dim() - len(site.shape)]
            parts.append(site.transform.inv(value).reshape(*batch, site.features))
        return torch.cat(parts, -1)

    def site_log_probs(self, z: Tensor) -> dict[str, Tensor]:
        """The summed log density of every site of the model at one point.

        Args:
            z: Point of shape ``(features,)``.

        Returns:
            For each sample site, latent or observed, a tensor without dimensions.
        """
        with torch.no_grad(), pyro.validation_enabled(False):
            trace = self._trace(self.constrain(z))
            trace.compute_log_prob()
        return {name: node["log_prob"].sum() for name, node in _sample_nodes(trace)}

    def has_support(self, name: str, support: Any) -> bool:
        """Whether a latent site is mapped to a support, judged by one point.

        Args:
            name: The site.
            support: A constraint.

        Returns:
            Whether ``biject_to(support)`` is the map of the site.
        """
        unconstrained, value = next(
            (u, v) for site, u, v in self._unpack(self.initial + 1) if site.name == name
        )
        try:
            image = biject_to(support)(unconstrained)
        except (NotImplementedError, RuntimeError):
            return False
        return image.shape == value.shape and torch.allclose(image, value, equal_nan=True)

    # How a point is evaluated

    def _unpack(self, z: Tensor) -> Iterator[tuple[LatentSite, Tensor, Tensor]]:
        batch = z.shape[:-1]
        for site, part in zip(
            self.sites, z.split([site.features for site in self.sites], -1), strict=True
        ):
            unconstrained = part.reshape(batch + site.unconstrained_shape)
            yield site, unconstrained, site.transform(unconstrained)

    def _trace(self, values: Mapping[str, Tensor], run: Run | None = None) -> Any:
        model, args, kwargs = run or Run(self.model, self.args, self.kwargs)
        if self.discrete:
            enumerated = config_enumerate(model, default="parallel")
            model = poutine.enum(enumerated, first_available_dim=-1 - self._max_plate_nesting)
        # Validation reads values, which a batch under vmap does not have.
        with self.on_device(), poutine.block(), pyro.validation_enabled(False), _Unvalidated():
            return poutine.trace(poutine.condition(model, data=dict(values))).get_trace(
                *args, **kwargs
            )

    def _single(self, z: Tensor, run: Run | None = None) -> Tensor:
        values, log_det = {}, z.new_zeros(())
        for site, unconstrained, value in self._unpack(z):
            values[site.name] = value
            log_det = log_det + site.transform.log_abs_det_jacobian(unconstrained, value).sum()
        with pyro.validation_enabled(False):
            trace = self._trace(values, run)
            if not self.discrete:
                return trace.log_prob_sum() + log_det
            return enumerated_log_prob(trace) + log_det

    def _find_subsampled(self, trace: Any) -> dict[str, tuple[int, int]]:
        sizes = {
            name: (int(node["fn"].size), int(node["fn"].subsample_size))
            for name, node in trace.nodes.items()
            if node["type"] == "sample"
            and site_is_subsample(node)
            and node["fn"].subsample_size is not None
        }
        subsampled = {name: (size, part) for name, (size, part) in sizes.items() if 0 < part < size}
        for name, node in _latent_nodes(trace):
            for frame in node["cond_indep_stack"] if not _is_discrete(node) else ():
                if frame.name in subsampled:
                    size, part = subsampled[frame.name]
                    raise ValueError(
                        f"Expected latent sites outside of subsampled plates; got {name!r} in plate {frame.name!r}, of "
                        f"which each run sees {part} of {size}. Leave out its subsample_size, or sum the site out by hand."
                    )
        return subsampled

    def _run_from(self, init_loc_fn: Callable[..., Any]) -> Any:
        def start(site: dict[str, Any]) -> Any:
            return site["fn"].sample() if _is_discrete(site) else init_loc_fn(site)

        with self.on_device(), poutine.block():
            return poutine.trace(InitMessenger(start)(self.model)).get_trace(
                *self.args, **self.kwargs
            )

    def _prototype(self, init_loc_fn: Callable[..., Any]) -> Any:
        try:
            trace = self._run_from(init_loc_fn)
        except ValueError:
            # Pyro names no site when NaN reaches the parameters of a distribution.
            with pyro.validation_enabled(False):
                _refuse_nan(self._run_from(init_loc_fn))
            raise
        _refuse_data_off_support(trace)
        return trace

    def _refuse_fixed_parts(self, init_loc_fn: Callable[..., Any]) -> None:
        try:
            with pyro.validation_enabled(False):
                self._run_from(init_loc_fn)
        except Exception as error:
            plates = ", ".join(map(repr, self.subsampled))
            raise ValueError(
                f"Expected a model that runs on all rows of its subsampled plates ({plates}) too; got one that says: "
                f"{_first_sentence(error)}."
            ) from error

    def _refuse_part_of_the_data(self, trace: Any) -> None:
        for frame in _frames(trace):
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"Expected a model that sees all its data; got plate {frame.name!r} with {frame.size} of "
                    f"{frame.full_size} given by subsample=. Use subsample_size=, or give the data by a DataLoader as args."
                )

    def _refuse_moving_supports(self) -> None:
        trace = self._trace(self.constrain(self.initial + 1))
        for site in self.sites:
            if not self.has_support(site.name, trace.nodes[site.name]["fn"].support):
                raise ValueError(
                    f"Expected latent sites whose support is the same everywhere; got {site.name!r}, whose support "
                    "depends on other latent sites. Write it as a function of a site with a fixed support."
                )


class Run(NamedTuple):
    """What is run: a model and its arguments."""

    model: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class Evaluator:
    """A scalar function of one point, and of tensors that all points share, evaluated with its gradient for many points.

    By the fastest of three ways whose results agree: as a captured graph of tensor operations, by :func:`torch.func.vmap`,
    or one point at a time.

    Args:
        function: From a point of shape ``(features,)`` and the shared tensors to a number.
        start: A point.
        batch_size: How many points one evaluation takes.
        shared: Tensors of the shapes to come.

    Attributes:
        mode: ``"captured"``, ``"vmap"`` or ``"loop"``.
        reason: What stands against a batch of points, if something does.

    Raises:
        ValueError: If the function has two values at one point.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        start: Tensor,
        batch_size: int,
        shared: Sequence[Tensor] = (),
    ) -> None:
        self.function, self.start, self.batch_size = function, start, batch_size
        self._vmap = torch.func.vmap(
            torch.func.grad_and_value(function), in_dims=(0, *(None for _ in shared))
        )
        # A graph knows one shape of each tensor.
        self._graphs: dict[tuple[torch.Size, ...], Callable[..., tuple[Tensor, Tensor]]] = {}
        self.mode, self.reason = self._choose_mode(tuple(shared))

    @torch.no_grad()
    def __call__(self, points: Tensor, *shared: Tensor) -> tuple[Tensor, Tensor]:
        """The values, of shape ``(n,)``, and gradients, of shape ``(n, features)``, at points of the latter shape."""
        evaluate = (
            self._loop
            if self.mode == "loop"
            else self._vmap
            if self.mode == "vmap"
            else self._graph(shared)
        )
        values, grads = [], []
        for chunk in points.split(self.batch_size):
            n = len(chunk)
            if n < self.batch_size and self.mode == "captured":
                chunk = torch.cat([chunk, chunk[-1:].expand(self.batch_size - n, -1)])
            grad, value = evaluate(chunk, *shared)
            values.append(value[:n])
            grads.append(grad[:n])
        return torch.cat(values), torch.cat(grads)

    def _loop(self, points: Tensor, *shared: Tensor) -> tuple[Tensor, Tensor]:
        grads, values = [], []
        for row in points:
            with torch.enable_grad():
                point = row.detach().requires_grad_()
                value = self.function(point, *shared)
                # A density that is flat everywhere has no graph.
                (grad,) = (
                    torch.autograd.grad(value, point)
                    if value.requires_grad
                    else (torch.zeros_like(row),)
                )
            grads.append(grad)
            values.append(value.detach())
        return torch.stack(grads), torch.stack(values)

    def _graph(self, shared: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
        key = tuple(tensor.shape for tensor in shared)
        if key not in self._graphs:
            self._graphs[key] = self._capture(
                self.start.expand(self.batch_size, -1).contiguous(), shared
            )
        return self._graphs[key]

    def _capture(
        self, points: Tensor, shared: tuple[Tensor, ...]
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        graph = make_fx(lambda rows, *rest: self._vmap(rows, *rest))(points, *shared)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph

    def _choose_mode(self, shared: tuple[Tensor, ...]) -> tuple[str, str]:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(3, len(self.start), generator=generator, device="cpu").to(self.start)
        points = (self.start + 0.1 * noise)[: self.batch_size]
        grads, values = self._loop(points, *shared)
        again = self._loop(points, *shared)[1]
        if not _agree(values, again):
            raise ValueError(
                "Expected a model whose log density is a function of its latent sites; got two values at one point. Does it "
                "draw random numbers outside of pyro.sample?"
            )
        n = len(points)
        batch = points.repeat(-(-self.batch_size // n), 1)[: self.batch_size]
        try:
            g, v = self._vmap(batch, *shared)
        except Exception as error:
            return "loop", _first_sentence(error)
        if not (_agree(v[:n], values) and _agree(g[:n], grads)):
            return "loop", "its values differ from those of single traces"
        try:
            graph = self._capture(batch, shared)
            g, v = graph(batch, *shared)
        except Exception:
            return "vmap", ""
        if not (_agree(v[:n], values) and _agree(g[:n], grads)):
            return "vmap", ""
        self._graphs[tuple(tensor.shape for tensor in shared)] = graph
        return "captured", ""


class WholePlates:
    """A model whose subsampled plates see all their rows.

    Args:
        model: The model.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with whole_plates():
            return self.model(*args, **kwargs)


class _Unvalidated(Messenger):
    """Lifts validation from distributions that were made before it was switched off, such as those of a PyroModule."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:  # type: ignore[override]
        msg["fn"] = unvalidated(msg["fn"])


def check_arguments(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a model as a tuple and a dictionary.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments, or ``None``.

    Returns:
        Both.

    Raises:
        TypeError: If they are not a list or tuple, and a mapping.
    """
    if not isinstance(args, (list, tuple)):
        raise TypeError(
            f"Expected args to be a sequence of arguments such as (x, y); got {type(args).__name__}."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"Expected kwargs to be a mapping of names to arguments; got {type(kwargs).__name__}."
        )
    return tuple(args), dict(kwargs or {})


def latent_sites(trace: Any) -> list[LatentSite]:
    """The continuous latent sites of a trace.

    Args:
        trace: A trace of the model.

    Returns:
        The sites in the order of the trace.

    Raises:
        ValueError: If there is none, or a site is discrete and cannot be enumerated.
    """
    sites = []
    nodes = list(_latent_nodes(trace))
    if not nodes:
        raise ValueError(
            "Expected a model with a latent site; got one in which every sample site is observed."
        )
    for name, node in nodes:
        fn, value = node["fn"], node["value"]
        if _is_discrete(node):
            if not fn.has_enumerate_support:
                raise ValueError(
                    f"Expected continuous or enumerable latent sites; got {name!r} with {_law(fn)}, which is discrete "
                    "without a finite support."
                )
            continue
        try:
            transform = biject_to(fn.support)
            unconstrained = transform.inv(value)
        except (NotImplementedError, AttributeError):
            raise ValueError(
                f"Expected latent sites with a support that biject_to knows; got {name!r} with {_law(fn)}."
            ) from None
        sites.append(
            LatentSite(name, value.shape, unconstrained.shape, transform, site_plates(node))
        )
    if not sites:
        names = ", ".join(repr(name) for name, _ in nodes)
        raise ValueError(
            f"Expected a model with a continuous latent site; got only discrete ones ({names}). "
            "Use pyro.infer.infer_discrete instead."
        )
    if not any(site.features for site in sites):
        names = ", ".join(repr(site.name) for site in sites)
        raise ValueError(
            f"Expected a model with a latent site that has entries; got only empty ones ({names})."
        )
    return sites


def _latent_nodes(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, node in _sample_nodes(trace):
        if not node["is_observed"]:
            yield name, node


def _sample_nodes(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, node in trace.nodes.items():
        if (
            node["type"] == "sample"
            and not site_is_subsample(node)
            and not node["infer"].get("_deterministic")
        ):
            yield name, node


def _frames(trace: Any) -> Iterator[Any]:
    for node in trace.nodes.values():
        if node["type"] == "sample":
            yield from (frame for frame in node["cond_indep_stack"] if frame.vectorized)


def _is_discrete(node: dict[str, Any]) -> bool:
    try:
        return bool(node["fn"].support.is_discrete)
    except NotImplementedError:
        return isinstance(node["value"], Tensor) and not node["value"].is_floating_point()


def _law(fn: Any) -> str:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return type(fn).__name__


def site_plates(node: dict[str, Any]) -> tuple[str | None, ...]:
    """For each dimension of a site's value the name of its plate, or ``None``."""
    event_dim = node["fn"].event_dim
    batch_dim = node["value"].dim() - event_dim
    names: list[str | None] = [None] * node["value"].dim()
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and -frame.dim <= batch_dim:
            names[batch_dim + frame.dim] = frame.name
    return tuple(names)


def _refuse_changing_shapes(first: Any, second: Any) -> None:
    shapes = [
        {name: tuple(node["value"].shape) for name, node in _latent_nodes(t)}
        for t in (first, second)
    ]
    for name in {**shapes[0], **shapes[1]}:
        if shapes[0].get(name) != shapes[1].get(name):
            was, now = (f"of shape {s[name]}" if name in s else "absent" for s in shapes)
            raise ValueError(
                f"Expected latent sites of one shape in every run of the model; {name!r} was {was} in one run and {now} in "
                "the next."
            )


def _refuse_nan(trace: Any) -> None:
    trace.compute_log_prob()
    at_fault = [
        repr(name) for name, node in _sample_nodes(trace) if bool(node["log_prob_sum"].isnan())
    ]
    if at_fault:
        raise ValueError(
            f"Expected a model with a finite log density where it starts; site {', site '.join(at_fault)} gives nan. Look "
            "for NaN in the data."
        ) from None


def _refuse_data_off_support(trace: Any) -> None:
    """Refuses data to which a distribution, unvalidated, would give a density that means nothing."""
    for name, node in _sample_nodes(trace):
        fn = node["fn"]
        if not node["is_observed"] or not validates(fn):
            continue
        value = torch.as_tensor(node["value"])
        log_prob = torch.as_tensor(unvalidated(fn).log_prob(value))
        given = value.shape[: value.dim() - fn.event_dim]
        plates = {frame.dim for frame in node["cond_indep_stack"] if frame.vectorized}
        if any(
            size > 1 and -k not in plates and (k > len(given) or given[-k] != size)
            for k, size in enumerate(reversed(log_prob.shape), start=1)
        ):
            raise ValueError(
                f"Expected data of the shape of their site; site {name!r} observes shape {tuple(value.shape)} under a "
                f"distribution of batch shape {tuple(fn.batch_shape)}, which together make {tuple(log_prob.shape)}."
            )
        try:
            inside = fn.support.check(value)
        except NotImplementedError:
            continue
        if bool((~inside & log_prob.isfinite()).any()):
            raise ValueError(
                f"Expected data within the support of their site; site {name!r} with {_law(fn)} observes values outside of "
                f"{fn.support}."
            )


def _agree(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-3
    scale = 1 + b.abs().nan_to_num(0, 0, 0).amax()
    return torch.allclose(a, b, rtol=tolerance, atol=float(tolerance * scale), equal_nan=True)


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0][:200] or type(error).__name__
