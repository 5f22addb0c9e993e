"""The log joint density of a model as a function of one vector, evaluated for many at a time."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._checks import caller_level, check_device, check_model, check_size, check_tensor
from .._sharing import in_shares
from . import checks
from .base import Density
from .cuts import find_centres
from .data import GivenData, as_data
from .enumeration import enumerated_groups, enumerated_log_prob, sample_enumerated
from .evaluator import Evaluator
from .faults import explained
from .inputs import Inputs
from .pointwise import map_points
from .runs import RunnableModel
from .sites import plate_size, rotated, sample_nodes
from .slopes import find_lost_slope
from .start import init_to_median
from .validity import ArgumentChecks, validated_sites

__all__ = ["LogDensity"]

# Rows of data times points in one evaluation: a limit of memory, and of the time between two looks
# at a deadline.
ROWS_AT_ONCE = 2**21


class LogDensity(RunnableModel, Density):
    r"""The unconstrained log joint density of a model.

    .. math:: \log p(g(z), \mathrm{data}) + \log|\det J_g(z)|

    The vector :math:`z` holds all continuous latent sites in the order of the model, each mapped to
    the reals by ``biject_to`` of its support, as Pyro's autoguides do. Discrete sites are summed
    out by enumeration. The model is batched by :func:`torch.func.vmap`, or else by a plate around
    it, and captured once as a graph of tensor operations, so that an evaluation costs mathematics
    and not effect handlers; the result is checked against single traces. Where the model branches
    on latent values, there is a graph for each combination of branches. A model that cannot be
    batched is evaluated one point at a time, with a warning that says so.

    Data and the model's own parameters are inputs of the graph. They are read when the density is
    made, and parameters are held at these values; :meth:`bind` gives the density of other ones. A
    plate with a ``subsample_size`` sees all its rows here; see
    :class:`pyroflows.model.minibatch.MiniBatchDensity` for a density of some of them.

    Args:
        model: A Pyro model.
        args: Its positional arguments, or a ``DataLoader`` whose batches are its arguments and all
            of whose batches are gone through in every evaluation; see
            :func:`pyroflows.model.minibatch.log_density_of`.
        kwargs: Its keyword arguments.
        init_loc_fn: Where the sites start; one of Pyro's initialisation functions.
        batch_size: How many vectors one captured evaluation takes.
        device: Where tensors that the model makes itself are put; torch's default device if
            ``None``.

    Attributes:
        features: Entries of :math:`z`.
        sites: The latent sites, in order.
        discrete: The names of the discrete latent sites.
        observed: The names of the sites that have data, those of ``pyro.factor`` among them.
        initial: The start, of shape ``(features,)``.
        init_loc_fn: The initialisation function that starts there: the one given, unless the model
            cannot be evaluated where that one starts.
        subsampled: For each plate with a ``subsample_size`` how many rows it has, and how many a
            run of the model sees.
        mode: ``"captured"``, ``"vmap"``, ``"plate"`` or ``"loop"``.
        failures: Counts the points of :meth:`evaluate` that could not be evaluated.

    Raises:
        ValueError: If the model has no continuous latent site or has one in a subsampled plate,
            changes the shape of a site between runs, or draws random numbers outside of its sites.

    Warns:
        UserWarning: If the model is evaluated in a slow way, or turns latents into numbers, so that
            its density has no gradient along them.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> density = LogDensity(model)
        >>> density.log_prob(torch.zeros(3, 1))
        tensor([-0.9189, -0.9189, -0.9189])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] | DataLoader = (),
        kwargs: Mapping[str, Any] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        batch_size: int = 256,
        device: str | torch.device | None = None,
    ) -> None:
        check_model(model)
        if device is not None:
            check_device("device", device)
        data = as_data(args, kwargs, device)
        self.batch_size = check_size("batch_size", batch_size)
        super().__init__(model, data, device)
        with explained(lambda: self._run_unvalidated(init_loc_fn)):
            trace = self._explore(init_loc_fn)
            self.batch_size = limit_batch(self.batch_size, trace)
            self._validated = validated_sites(trace)
            self._make_program()
            self._set_centres(find_centres(self, self.sites))
            self.data.check(self, trace)
        if self._program.way.warning:
            warnings.warn(self._program.way.warning, stacklevel=caller_level())
        if not self.batched:
            self._tell_lost_slope()

    def _tell_lost_slope(self) -> None:
        site = find_lost_slope(self.evaluate_inputs, self.sites, self.initial)
        if site:
            warnings.warn(
                f"The log density has no gradient along latent {site!r}, which the model turns "
                "into a number, so that a fit will not follow it. Keep it a tensor, and use the "
                "functions of torch.",
                stacklevel=caller_level(),
            )

    # What it is a density of

    def __deepcopy__(self, memo: dict[int, Any]) -> LogDensity:
        # A density does not change, and its model and data may be large, or not to be copied.
        return self

    @property
    def mode(self) -> str:
        """How points are evaluated: ``"captured"``, ``"vmap"``, ``"plate"`` or ``"loop"``."""
        return self._program.way.mode

    @property
    def batched(self) -> bool:
        """Whether many points are evaluated at a time."""
        return self.mode != "loop"

    @property
    def full(self) -> LogDensity:
        """The density over all data: this one."""
        return self

    @property
    def streamed(self) -> bool:
        """Whether the data come from a loader, so that ``args`` is only its first batch."""
        return self.data.streamed

    def bind(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        batch_size: int | None = None,
    ) -> LogDensity:
        """The density of the same model on other inputs, which shares the graph of this one.

        Args:
            args: Positional arguments; these if ``None``. Tensors of equal shapes share one graph.
            kwargs: Keyword arguments; these if ``None``.
            parameters: Values of some :attr:`parameters`; the others keep theirs. Give
                ``density.parameters`` for the ones of the model itself, as they are now.
            rows: For each plate with a ``subsample_size`` the indices of its rows, by which the
                likelihood is scaled up; all rows if ``None``.
            batch_size: How many vectors one evaluation takes; as here if ``None``.

        Returns:
            The density, with the same latent sites. The sites' shapes must not depend on what is
            given.

        Raises:
            TypeError: If ``args`` is no sequence or ``kwargs`` no mapping.
            ValueError: If a parameter or plate is unknown, a parameter has another shape, or data
                broadcast their site.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> def model(y):
            ...     shift = pyro.param("shift", torch.tensor(1.0))
            ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(x + shift, 1.0), obs=y)
            >>> density = LogDensity(model, (torch.tensor(2.0),))
            >>> other = density.bind((torch.tensor(0.0),), parameters=density.parameters)
            >>> other.log_joint(torch.zeros(1)).backward()
            >>> density.parameters["shift"].grad
            tensor(-1.)
        """
        args = self.inputs.args if args is None else args
        kwargs = self.inputs.kwargs if kwargs is None else kwargs
        for name, given in {"parameters": parameters, "rows": rows}.items():
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"Expected {name} to be a mapping from names; got {given!r}.")
        self._check_plates(rows or {})
        inputs = Inputs(*checks.check_arguments(args, kwargs), rows or {}, self.inputs.parameters)
        checks.check_call("the model", self.unwrapped_model, inputs.args, inputs.kwargs)
        bound = copy.copy(self)
        bound.inputs = inputs.with_parameters(parameters or {})
        bound.data = GivenData(bound.inputs)
        if bound.inputs.shapes() != self.inputs.shapes():
            bound._check_shapes()
        if not all(site.complete for site in self.sites):
            checks.check_same_masks(self.sites, bound.trace())
        bound.batch_size = check_size(
            "batch_size", self.batch_size if batch_size is None else batch_size
        )
        with torch.no_grad():
            bound._program = self._evaluator.make_program(bound.inputs, bound.batch_size)
        return bound

    def rotated(self, centres: Mapping[str, Tensor]) -> LogDensity:
        """The density of the same model with other :attr:`centres`.

        Args:
            centres: For some circular sites the angles at zero, of shape ``(features,)``.

        Returns:
            The density; this one if these are its centres.
        """
        own = self.centres
        if all(torch.equal(own[name], centre.to(own[name])) for name, centre in centres.items()):
            return self
        other = copy.copy(self)
        other._set_centres(centres)
        return other

    def _set_centres(self, centres: Mapping[str, Tensor]) -> None:
        if centres:
            values = self.constrain(self.initial)
            self.sites = rotated(self.sites, centres)
            self.initial = self.unconstrain(values)
            self._make_program()

    def _make_program(self) -> None:
        self._evaluator = self._make_evaluator()
        self._program = self._evaluator.make_program(self.inputs, self.batch_size)

    def _make_evaluator(self) -> Evaluator:
        in_plate = None if self.discrete else self._log_joints
        return Evaluator(self._log_joint, self.initial, self.failures, in_plate)

    def _check_plates(self, rows: Mapping[str, Tensor]) -> None:
        if rows and set(rows) != set(self.subsampled):
            known = ", ".join(map(repr, self.subsampled)) or "none"
            raise ValueError(
                f"Expected rows of every plate with a subsample_size ({known}); got those of "
                f"{', '.join(map(repr, rows))}."
            )
        for name, index in rows.items():
            checks.check_rows(name, index, self.subsampled[name][0])

    # Values

    @torch.no_grad()
    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        check_tensor("z", z, (self.features,))
        points = z.detach().reshape(-1, self.features)
        if not len(points):
            return z.new_zeros(z.shape[:-1]), torch.zeros_like(z)
        evaluate = functools.partial(self.data.evaluate, self)
        values, grads = in_shares(evaluate, points, width=1 + self.features)
        return values.reshape(z.shape[:-1]), grads.reshape(z.shape)

    def precise_log_prob(self, z: Tensor) -> Tensor:
        if self.streamed or z.dtype == torch.double:
            return super().precise_log_prob(z)
        # A graph would not pay, because few points are ever asked for.
        mode = "vmap" if self.mode == "captured" else self.mode
        try:
            program = self._evaluator.make_program(self.inputs, self.batch_size, mode)
            return program(z.detach().double())[0]
        except RuntimeError:  # single and double precision do not mix in matrix products
            return super().precise_log_prob(z)

    def evaluate_inputs(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The log density on the present inputs, which are one batch if the data are streamed.

        Args:
            points: Points of shape ``(n, features)``.

        Returns:
            Values of shape ``(n,)`` and gradients of shape ``(n, features)``.
        """
        values, grads = self._program(points)
        return values, grads

    def log_joint(self, z: Tensor) -> Tensor:
        """The log density with a graph, to differentiate it by the points, by data and by
        parameters that :meth:`bind` has put in.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            Tensor of shape ``(*)``, NaN where the model fails.

        Raises:
            ValueError: If the last dimension is not ``features``, or the data come from a loader.
        """
        self._check_not_streamed("log_joint")
        check_tensor("z", z, (self.features,))
        points = z.reshape(-1, self.features)
        if not len(points):
            return z.sum(-1)
        program = self._evaluator.make_differentiable(self.inputs, self.batch_size)
        return program(points)[0].reshape(z.shape[:-1])

    @torch.no_grad()
    def site_terms(self, z: Tensor) -> dict[str, Tensor]:
        r"""The log density as a sum of terms, one for each site and each row of its plates.

        A latent site's term is its log density plus the :math:`\log|\det J|` of its map from the
        reals; an observed site's, and a ``pyro.factor``'s, its log density. Masks and scales are
        applied. The terms add up to :meth:`log_prob`.

        Sites that depend on discrete latent ones are summed over these together: each group of them
        has one term, under the name of its first discrete site, with the plates that all of the
        group are in. A continuous site in a group keeps a term of its log-Jacobian alone.

        Args:
            z: Points of shape ``(*, features)``.

        Returns:
            For each site a tensor of shape ``(*, *batch_shape)``, where ``batch_shape`` is that of
            its distribution: as in Pyro, a plate has its dimension from the right, and dimensions
            between plates have size 1. NaN where the model fails.

        Raises:
            ValueError: If the last dimension is not ``features``, or the data come from a loader.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> def model():
            ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("n", 3):
            ...         pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(3))
            >>> terms = LogDensity(model).site_terms(torch.zeros(5, 1))
            >>> {name: tuple(term.shape) for name, term in terms.items()}
            {'x': (5,), 'y': (5, 3)}
        """
        self._check_not_streamed("site_terms")
        check_tensor("z", z, (self.features,))
        points = z.detach().reshape(-1, self.features)
        # Without points, the shapes are those at the start.
        given = points if len(points) else self.initial.unsqueeze(0)
        batch_size = self.batch_size if self.batched else 1
        terms = map_points(self._terms, given, batch_size, safe=self.initial, random=False)
        return {
            name: term[: len(points)].reshape(z.shape[:-1] + term.shape[1:])
            for name, term in terms.items()
        }

    def sample_discrete(self, z: Tensor) -> dict[str, Tensor]:
        """Draws the discrete sites from their posterior given the continuous ones.

        Args:
            z: Point of shape ``(features,)``.

        Returns:
            For each discrete site its value.
        """
        with self._given(self.inputs):
            return sample_enumerated(self._trace(self.constrain(z), self.inputs))

    def observed_terms(self, z: Tensor) -> dict[str, Tensor]:
        """The log density of each entry of the observed sites, summed over the discrete sites.

        Args:
            z: Point of shape ``(features,)``.

        Returns:
            For each observed site a tensor of the shape of its plates. Sites and rows that depend
            on the same discrete sites have no terms of their own, and are left out.
        """
        with self._given(self.inputs):
            trace = self._trace(self.constrain(z), self.inputs)
            groups = enumerated_groups(trace) if self.discrete else []
            trace.compute_log_prob()
        nodes = dict(sample_nodes(trace))
        grouped = {name for group in groups for name in group.names}
        observed = [name for name, node in nodes.items() if node["is_observed"]]
        terms = {name: nodes[name]["log_prob"] for name in observed if name not in grouped}
        for group in groups:
            rest = [name for name in group.names if name not in self.discrete]
            if len(rest) == 1 and group.log_prob.numel() == plate_size(nodes[rest[0]]):
                terms[rest[0]] = group.log_prob
        return {name: terms[name] for name in observed if name in terms}

    def site_log_probs(self, z: Tensor) -> dict[str, Tensor]:
        """The summed log density of every site at one point, to tell which is at fault.

        Args:
            z: Point of shape ``(features,)``.

        Returns:
            For each sample site, latent or observed, a tensor without dimensions. The Jacobians of
            latent sites are left out, and sites that are enumerated are summed over all values.
        """
        if check_tensor("z", z, (self.features,)).dim() != 1:
            raise ValueError(
                f"Expected z to be one point, of shape ({self.features},); got {tuple(z.shape)}."
            )
        nodes = sample_nodes(self.trace(z, score=True))
        return {name: node["log_prob"].detach().sum() for name, node in nodes}

    def log_joint_of(self, model: Callable[..., Any]) -> Tensor:
        """The log density of a variant of the model at the start, a tensor without dimensions."""
        variant = copy.copy(self)
        variant.model = model
        return variant._log_joint(self.initial, self.inputs).detach()

    def _check_not_streamed(self, method: str) -> None:
        if self.streamed:
            raise ValueError(
                f"Expected data given as args in {method}; got a loader. Give it one batch by "
                "bind(batch)."
            )

    def _log_joint(self, z: Tensor, inputs: Inputs) -> Tensor:
        with self._given(inputs):
            values, log_det = {}, z.new_zeros(())
            for site, unconstrained, value in self._unpack(z):
                values[site.name] = value
                log_det = log_det + site.log_det(unconstrained, value).sum()
            with ArgumentChecks(self._validated) as checked:
                trace = self._trace(values, inputs)
            total = enumerated_log_prob(trace) if self.discrete else trace.log_prob_sum()
            return checked.nan_unless_valid(total + log_det)

    def _log_joints(self, z: Tensor, inputs: Inputs) -> Tensor:
        """The log density at many points ``(n, features)``, by a plate around the model."""
        n, values = len(z), {}
        total = z.new_zeros(n)
        for site, unconstrained, value in self._unpack(z):
            total = total + site.log_det(unconstrained, value).reshape(n, -1).sum(-1)
            between = (1,) * (self._batch_dims - self._batch_dims_of[site.name])
            values[site.name] = value.reshape(n, *between, *site.shape)
        rows = 1 + self._batch_dims
        checked = ArgumentChecks(self._validated, rows)
        with self._given(inputs), pyro.plate("_points", n, dim=-rows), checked:
            trace = self._trace(values, inputs)
            trace.compute_log_prob()
        for _, node in sample_nodes(trace):
            total = total + node["log_prob"].reshape(n, -1).sum(-1)
        return checked.nan_unless_valid(total)

    def _terms(self, z: Tensor) -> dict[str, Tensor]:
        with self._given(self.inputs):
            trace = self._trace(self.constrain(z), self.inputs)
            groups = enumerated_groups(trace) if self.discrete else []
            trace.compute_log_prob()
            nodes = dict(sample_nodes(trace))
            terms = {name: node["log_prob"] for name, node in nodes.items()}
            for group in groups:
                for name in group.names:
                    del terms[name]
                first = next(name for name in group.names if name in self.discrete)
                terms[first] = group.log_prob
            for site, unconstrained, value in self._unpack(z):
                log_det = site.log_det(unconstrained, value)
                batch_dim = len(nodes[site.name]["fn"].batch_shape)
                terms[site.name] = terms.get(site.name, 0.0) + _sum_beyond(log_det, batch_dim)
        return terms


def limit_batch(batch_size: int, trace: Any) -> int:
    """How many points an evaluation takes, at most so many, given the sizes of the sites."""
    sizes = [torch.as_tensor(node["value"]).numel() for _, node in sample_nodes(trace)]
    return max(1, min(batch_size, ROWS_AT_ONCE // max([1, *sizes])))


def _sum_beyond(term: Tensor, dims: int) -> Tensor:
    """Sums all but the first dimensions of a term."""
    return term.sum(tuple(range(dims, term.dim()))) if term.dim() > dims else term
