"""A Pyro model as it is run, and its latent sites as one vector."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.enum import config_enumerate
from torch import Tensor
from torch.distributions import biject_to

from .._checks import check_tensor, count
from .._compat import build_guide, stored_parameters
from .._random import forked
from . import checks
from .data import GivenData, LoadedData
from .faults import describe_error, explained
from .handlers import (
    GivenParameters,
    GivenRows,
    ParameterRecorder,
    PlainNames,
    StartInPlates,
    SubstituteTensors,
    Unvalidated,
    WholePlates,
)
from .inputs import Inputs, name_parameters
from .masks import settle_masks
from .missing import MissingData
from .program import FAILURES
from .sites import (
    LatentSite,
    SiteKind,
    find_latent_sites,
    is_discrete,
    latent_nodes,
    observed_names,
    plate_frames,
    sample_nodes,
    split_vector,
)
from .start import start_elsewhere
from .supports import WithinSupport

__all__ = ["RunnableModel", "value_at"]

# Numbers of nested plates that are tried for a model that runs under enumeration only.
NESTINGS = range(4)

# Distances from the start, on the unconstrained scale, at which a second run is tried.
STEPS = (1.0, -1.0, 0.1, -0.1, 0.01, -0.01)


class RunnableModel:
    """A Pyro model that is run on its data, with its continuous latent sites at a point.

    The sites, the start and the model's own parameters are found by first runs; see the attributes
    of :class:`pyroflows.model.LogDensity`.

    Args:
        model: The model.
        data: Its data.
        device: Where tensors that the model makes itself are put; torch's default device if
            ``None``.

    Attributes:
        inputs: The data on which the model is run, and its parameters.
        model: The model as it is run on these data.
        unwrapped_model: The model as it was given.
    """

    features: int
    initial: Tensor
    sites: list[LatentSite]

    def __init__(
        self,
        model: Callable[..., Any],
        data: GivenData | LoadedData,
        device: str | torch.device | None,
    ) -> None:
        self.data, self.device = data, device
        self.inputs = data.first
        checks.check_call("the model", model, self.args, self.kwargs)
        self.unwrapped_model = model
        self.model = data.wrap(model)
        self._enumerated_nesting: int | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments of the model."""
        return self.inputs.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the model."""
        return dict(self.inputs.kwargs)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The model's own parameters by name: the leaves that an optimiser moves.

        A constrained ``pyro.param`` is there on the unconstrained scale. They are named as in the
        param store, as in the model if it is a module, or else by a number. Those of the param
        store are its present ones, if it has been cleared since.
        """
        stored = stored_parameters()
        return {
            name: stored.get(name, leaf) if name in self._stored else leaf
            for name, leaf in self._leaves.items()
        }

    @property
    def needs_enumeration(self) -> bool:
        """Whether the model runs with all values of its discrete sites only, not with one."""
        return self._enumerated_nesting is not None

    # Sites

    @property
    def centres(self) -> dict[str, Tensor]:
        """For each circular site the angles at zero, opposite to which its circle is cut."""
        return {site.name: site.centres for site in self.sites if site.kind is SiteKind.CIRCLE}

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Maps vectors to values of the sites.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            For each site a tensor of shape ``(*, *site_shape)``; an entry that a mask switches off
            has the image of zero.
        """
        check_tensor("z", z, (self.features,))
        return {site.name: value for site, _, value in self._unpack(z)}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Maps values of the sites to vectors.

        Args:
            values: For each site a tensor of shape ``(*, *site_shape)``.

        Returns:
            Tensor of shape ``(*, features)``.
        """
        return torch.cat([site.pack(values[site.name]) for site in self.sites], -1)

    def has_support(self, name: str, support: Any) -> bool:
        """Whether a latent site is mapped to a support, judged by one point.

        Args:
            name: The site.
            support: A constraint.

        Returns:
            Whether ``biject_to(support)`` is the map of the site, or, for angles, the identity.
        """
        site, unconstrained, value = next(
            found for found in self._unpack(self.initial + 1) if found[0].name == name
        )
        if site.kind is SiteKind.CIRCLE:
            value = unconstrained
        try:
            image = biject_to(support)(unconstrained)
        except (NotImplementedError, RuntimeError):
            return False
        return image.shape == value.shape and torch.allclose(image, value, equal_nan=True)

    def _unpack(self, z: Tensor) -> Iterator[tuple[LatentSite, Tensor, Tensor]]:
        for site, unconstrained in split_vector(self.sites, z):
            yield site, unconstrained, site.transform(unconstrained)

    # Runs

    @property
    def continuous_model(self) -> Callable[..., Any]:
        """The model as a guide of its continuous sites sees it: without the discrete ones."""
        return poutine.block(self.model, hide=self.discrete) if self.discrete else self.model

    def introduce(self, guide: Any) -> None:
        """Runs a fresh autoguide once on the model's arguments, outside of all traces, so that it
        is built."""
        with self.on_device(), poutine.block():
            build_guide(guide, self.args, self.kwargs)
        if self.centres:
            guide.rotate(self.centres)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Context manager that puts tensors created by the model on its device."""
        return contextlib.nullcontext() if self.device is None else torch.device(self.device)

    def trace(self, z: Tensor | None = None, score: bool = False) -> Any:
        """A trace of the model on its inputs, with its continuous latent sites at a point.

        Args:
            z: Point of shape ``(features,)``; the start if ``None``.
            score: Whether to compute the log density of its sites.

        Returns:
            The trace; discrete latent sites have all their values.
        """
        with self._given(self.inputs):
            trace = self._trace(self.constrain(self.initial if z is None else z), self.inputs)
            if score:
                trace.compute_log_prob()
        return trace

    def trace_of(self, model: Callable[..., Any]) -> Any:
        """A trace of a variant of the model on the inputs of this one.

        Args:
            model: The model under other handlers, such as ``poutine.uncondition(density.model)``.

        Returns:
            The trace.
        """
        with self._given(self.inputs):
            return poutine.trace(model).get_trace(*self.args, **self.kwargs)

    def run_from(self, init_loc_fn: Callable[..., Any]) -> Any:
        """A trace of the model from an initialisation function, validated as Pyro's setting says.

        Args:
            init_loc_fn: Where the sites start.

        Returns:
            The trace.
        """

        def start(site: dict[str, Any]) -> Any:
            checks.check_site(site["name"], site["fn"])
            checks.check_sizes(site["name"], site["fn"])
            return site["fn"].sample() if is_discrete(site) else init_loc_fn(site)

        model = self.model
        if self._enumerated_nesting is not None:
            model = self._enumerate(model, self._enumerated_nesting)
        with self.on_device(), poutine.block(), PlainNames():
            model = poutine.trace(InitMessenger(start)(StartInPlates()(model)))
            return model.get_trace(*self.args, **self.kwargs)

    def _run_unvalidated(self, init_loc_fn: Callable[..., Any]) -> Any:
        with pyro.validation_enabled(False):
            return self.run_from(init_loc_fn)

    @contextlib.contextmanager
    def _given(self, inputs: Inputs) -> Iterator[None]:
        """The context of every run of the model and of every use of its distributions."""
        # Validation reads values, which a batch under vmap does not have.
        held = self._holding(inputs.parameters)
        unvalidated = pyro.validation_enabled(False)
        with self.on_device(), poutine.block(), PlainNames(), unvalidated, held:
            yield

    @contextlib.contextmanager
    def _holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Gives the model's own parameters their values, as leaves and by their names."""
        if not values:
            yield
            return
        of_statements = {name: value for name, value in values.items() if name in self._statements}
        present = self.parameters
        pairs = [
            (leaf, value)
            for name, value in values.items()
            for leaf in (self._leaves[name], present[name])
        ]
        with GivenParameters(of_statements), SubstituteTensors(pairs):
            yield

    def _trace(self, values: Mapping[str, Tensor], inputs: Inputs) -> Any:
        model = GivenRows(inputs.rows)(self.unwrapped_model) if inputs.rows else self.model
        if self.discrete:
            model = self._enumerate(model, self._max_plate_nesting)
        model = poutine.trace(poutine.condition(model, data=dict(values)))
        with WithinSupport(), Unvalidated(), MissingData():
            return model.get_trace(*inputs.args, **inputs.kwargs)

    @staticmethod
    def _enumerate(model: Callable[..., Any], nesting: int) -> Callable[..., Any]:
        """A model with its discrete sites enumerated, on the left of so many dimensions."""
        enumerated = config_enumerate(model, default="parallel")
        return poutine.enum(enumerated, first_available_dim=-1 - nesting)

    # First runs

    def _explore(self, init_loc_fn: Callable[..., Any]) -> Any:
        """Finds the start, the sites and the parameters; returns the run at the start."""
        trace, self.init_loc_fn = self._find_start(init_loc_fn)
        self.subsampled = self.data.find_subsampled(trace)
        if self.subsampled:
            trace = self._take_all_rows(self.init_loc_fn)
        self._read_sites(trace)
        self._run_again(trace)
        return trace

    def _find_start(self, init_loc_fn: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
        """A run from the first start at which the model can be evaluated, and that start."""
        try:
            return self._prototype(init_loc_fn), init_loc_fn
        except FAILURES:
            start = start_elsewhere(self.run_from)
            if start is None:
                raise
        return self._prototype(start), start

    def _prototype(self, init_loc_fn: Callable[..., Any]) -> Any:
        try:
            return self._first_run(init_loc_fn)
        except Exception:
            trace = self._first_enumerated_run(init_loc_fn)
            if trace is None:
                raise
            return trace

    def _first_run(self, init_loc_fn: Callable[..., Any]) -> Any:
        trace = self.run_from(init_loc_fn)
        checks.check_data(trace, self._enumerated_nesting)
        return trace

    def _first_enumerated_run(self, init_loc_fn: Callable[..., Any]) -> Any:
        """A run with discrete sites enumerated, for a model that runs in no other way."""
        for nesting in NESTINGS:
            self._enumerated_nesting = nesting
            try:
                trace = self._first_run(init_loc_fn)
            except Exception:
                continue  # plates nested deeper, or an error that no enumeration mends
            discrete = any(is_discrete(node) for _, node in latent_nodes(trace))
            if discrete and _depth(trace) <= nesting:
                return trace
        self._enumerated_nesting = None
        return None

    def _take_all_rows(self, init_loc_fn: Callable[..., Any]) -> Any:
        """Runs the model on all rows of its subsampled plates from here on."""
        self.model = WholePlates(self.model)
        try:
            checks.check_data(self._run_unvalidated(init_loc_fn), self._enumerated_nesting)
        except Exception as error:
            plates = [
                f"{count(size, 'row')} of plate {name!r}"
                for name, (size, _) in self.subsampled.items()
            ]
            raise ValueError(
                f"Expected a model that runs on all {' and '.join(plates)} too; got "
                f"{describe_error(error)}. Index the data by the plate, or give a DataLoader as "
                "args."
            ) from error
        return self._prototype(init_loc_fn)

    def _read_sites(self, trace: Any) -> None:
        checks.check_latents(trace)
        self.discrete = [name for name, node in latent_nodes(trace) if is_discrete(node)]
        self.observed = observed_names(trace)
        self._max_plate_nesting = max(self._enumerated_nesting or 0, _depth(trace))
        nodes = sample_nodes(trace)
        self._batch_dims_of = {name: len(node["fn"].batch_shape) for name, node in nodes}
        self._batch_dims = max([self._max_plate_nesting, *self._batch_dims_of.values()])
        with self._given(self.inputs):
            found = find_latent_sites(trace)
            self.sites = settle_masks(found, trace, lambda v: self._trace(v, self.inputs))
        checks.check_entries(self.sites)
        values = {site.name: trace.nodes[site.name]["value"].detach() for site in self.sites}
        self.initial = self.unconstrain(values)
        self.features = self.initial.numel()

    def _run_again(self, first: Any) -> None:
        """Runs the model at another point: to compare sites, and to find its parameters."""
        recorder = ParameterRecorder()
        with recorder, pyro.validation_enabled(False), torch.no_grad():
            second = self._run_elsewhere()
            second.compute_log_prob()
        checks.check_same_shapes(first, second)
        self._check_fixed_supports(second)
        leaves = list(recorder.parameters.values())
        self._leaves = name_parameters(self.unwrapped_model, leaves, self.inputs)
        self._stored = set(stored_parameters()).intersection(self._leaves)
        # A module must keep the parameters that it has.
        modules = {n for n, leaf in self._leaves.items() if isinstance(leaf, torch.nn.Parameter)}
        self._statements = self._stored - modules
        values = {name: leaf.detach().clone() for name, leaf in self._leaves.items()}
        self.inputs = self.inputs._replace(parameters=values)

    def _run_elsewhere(self) -> Any:
        """A run near the start, closer where the model fails."""
        for step in STEPS:
            values = self.constrain(self.initial + step)
            try:
                return self.run_from(lambda site, values=values: value_at(values, site))
            except FAILURES as error:
                failure = error
        raise failure

    def _check_fixed_supports(self, trace: Any) -> None:
        for site in self.sites:
            if not self.has_support(site.name, trace.nodes[site.name]["fn"].support):
                raise ValueError(
                    "Expected latent sites whose support is the same everywhere; got "
                    f"{site.name!r}, whose support depends on other latent sites. Write it as a "
                    "function of a site with a fixed support."
                )

    def _check_shapes(self) -> None:
        """Checks the data among inputs of other shapes than the first."""
        values = self.constrain(self.initial)
        with forked(0), explained(), pyro.validation_enabled(False), torch.no_grad():
            trace = self.run_from(lambda site: value_at(values, site))
            checks.check_data(trace, self._enumerated_nesting)


def value_at(values: Mapping[str, Tensor], site: dict[str, Any]) -> Tensor:
    """A value of a site, or a draw if there is none of its shape."""
    value = values.get(site["name"])
    if value is not None and value.shape == site["fn"].shape():
        return value
    return site["fn"].sample()


def _depth(trace: Any) -> int:
    """How many dimensions from the right the plates of a trace take."""
    return max([0, *(-frame.dim for frame in plate_frames(trace))])
