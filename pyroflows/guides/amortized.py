"""A flow over globals, and conditional flows over the latents of each row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from .._checks import check_function, check_model, check_positive, check_size
from .._compat import module_name
from ..distributions.flow import sum_rightmost
from ..flows import Flow
from ..model.handlers import StartInPlates
from ..model.rehearsal import Coordinates, rehearse
from ..model.sites import (
    LatentSite,
    find_latent_sites,
    is_discrete,
    latent_nodes,
    observed_names,
    plate_frames,
    split_vector,
)
from ..model.start import init_to_median
from ..nn import RowEncoder, RowTable
from ..nn.encoder import Skip
from ..transforms import Transform
from .auto import ScoredDeltas, check_factory, whitened_flow
from .late import BuiltLate
from .row_block import (
    Encoding,
    LocalSite,
    MakeFlow,
    RowBlock,
    RowReader,
    Rows,
    amortized_flow,
    check_encoder,
    make_encoder,
    plates_of,
)

__all__ = ["AutoAmortizedFlow"]


class Run(NamedTuple):
    """What one call of the guide knows of the model at its arguments.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        plates: The plates by name.
        trace: A trace of the model at the globals that were drawn.
        reference: A trace of the model at globals in their middle, without a graph.
    """

    args: Any
    kwargs: Mapping[str, Any]
    plates: Mapping[str, Any]
    trace: Any
    reference: Any

    def sample(self, name: str, fn: Any) -> Tensor:
        """Samples a site in the plates that it has in the model."""
        with contextlib.ExitStack() as stack:
            for plate in plates_of(self.trace.nodes[name]):
                stack.enter_context(self.plates[plate])
            value: Tensor = pyro.sample(name, fn)
        return value


class AutoAmortizedFlow(BuiltLate):
    r"""A flow over globals, and for the latents of each data row a flow that reads the row.

    The globals :math:`\theta` have a flow with a whitening map, as in :class:`AutoFlow`. The sites
    :math:`z_i` in a plate of rows have a flow whose context is what an encoder makes of the row's
    data :math:`y_i`, and the globals,

    .. math:: q(\theta, z) = q(\theta) \prod_i q(z_i \mid e(y_i), \theta), \qquad
        u_i = m(c_i) + s(c_i) \odot f(x_i; c_i), \quad c_i = (e(y_i), \theta).

    The entries :math:`u_i` are coordinates of the site :math:`z_i` that follow the location and
    scale of its prior as far as it is learned for each row, from not at all (centred) to wholly
    (non-centred); see :class:`pyroflows.model.rehearsal.Coordinates`.

    In each call the model is run once unseen, with the globals drawn, which tells the rows that its
    plates see and their data; the plates of the guide then have these rows, whether the model draws
    them (``subsample_size``), takes them from an index (``subsample=``) that changes from step to
    step, or sees each batch of a ``DataLoader``. Where the rows have no data, as in predictions,
    their sites are left to the prior given the globals.

    Args:
        model: A Pyro model.
        encoder: A module, or another callable, from the data of rows, tensors of shape
            ``(rows, *)``, to ``(rows, features)``; ``None`` for a
            :class:`pyroflows.nn.RowEncoder` of sets, series and vectors; ``"rows"`` for parameters
            of each row instead; or a dictionary of these by plate.
        flow: A ready-made flow such as ``RealNVP``, or any callable from (features,
            context_features) to a :class:`Flow` or a :class:`Transform`, for the latents of a row.
        global_flow: Likewise from the number of features, for the globals; see :class:`AutoFlow`.
        data: A function of the arguments of the model that returns the tensors, with rows in front,
            that the encoder reads. By default these are the values of the sites observed in the
            plate, zero where a mask switches them off and then followed by the mask, and the
            other arguments with a row for each of the plate, such as covariates.
        plates: Names of the plates of rows. By default the subsampled plates with latent sites;
            where there is none, those with latent and observed sites.
        create_plates: A function of the arguments of the model that returns plates, as that of
            Pyro's autoguides; seldom needed, because the rows of the model are found anyway.
        init_loc_fn: Where the globals start; see :class:`AutoFlow`.
        init_scale: Standard deviation of the globals at the start, in unconstrained units.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``init_scale`` is not positive; in the first call, if a plate has no data to
            encode, an encoder gives another shape, a row is out of its plate's range, a flow does
            not fit, or a latent site is discrete, masked or inside of two subsampled plates.

    Reference:
        Kingma, Welling, "Auto-encoding variational Bayes", 2013, https://arxiv.org/abs/1312.6114

        Agrawal, Domke, "Amortized variational inference for simple hierarchical models", 2021,
        https://arxiv.org/abs/2111.03144

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> data = torch.randn(100, 3)
        >>> def model():
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", 100, subsample_size=10) as rows:
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         noise = dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1)
        ...         pyro.sample("y", noise, obs=data[rows])
        >>> guide = AutoAmortizedFlow(model)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> loss = svi.step()
        >>> guide.sample(5)["z"].shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Any = None,
        flow: MakeFlow | None = None,
        *,
        global_flow: Callable[[int], Flow | Transform] | None = None,
        data: Callable[..., Any] | None = None,
        plates: Sequence[str] | None = None,
        create_plates: Callable[..., Any] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        self._init_scale = check_positive("init_scale", init_scale)
        check_factory("flow", flow)
        check_factory("global_flow", global_flow)
        check_model(model)
        for name, function in (
            ("data", data),
            ("create_plates", create_plates),
            ("init_loc_fn", init_loc_fn),
        ):
            check_function(name, function)
        for each in encoder.values() if isinstance(encoder, Mapping) else [encoder]:
            check_encoder(each)
        super().__init__(model, create_plates=create_plates)
        self._init_loc_fn = init_loc_fn
        self._make_flow, self._make_global_flow = flow, global_flow
        self._data, self._chosen_plates = data, _check_plates(plates)
        self._encoders = (encoder,)  # not a submodule before the guide is built
        self._count = 0

    # Construction, once the model has run

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._check_model()
        plain = self._model
        starting = InitMessenger(self._init_loc_fn)(StartInPlates()(self.model))
        try:
            self._model = (starting,)
            super()._setup_prototype(*args, **kwargs)
            self._model = plain
            self._build(args, kwargs)
            self.load_waiting_state()
        except Exception:
            # A guide that refused a model once must refuse it again, and not go on half made.
            self.prototype_trace = None
            raise
        finally:
            self._model = plain

    def _check_model(self) -> None:
        if self._model is None:
            raise RuntimeError(
                f"Expected a guide with a model; got one that was pickled, and pickles hold no "
                f"model. Make a new {type(self).__name__}(model) and load its state_dict."
            )

    def _build(self, args: Any, kwargs: Any) -> None:
        nodes = dict(latent_nodes(self.prototype_trace))
        _refuse_discrete(nodes)
        sites = find_latent_sites(self.prototype_trace)
        self._like = {name: node["value"].detach() for name, node in nodes.items()}
        trace = self._rehearse({}, {}, args, kwargs)
        self._depth = max((-frame.dim for frame in plate_frames(trace)), default=0)
        local = _local_sites(nodes, trace, self._chosen_plates)
        inside = {name for names in local.values() for name in names}
        self._check_encoders(local)
        self._globals = [site for site in sites if site.name not in inside]
        self._own = {site.name for site in self._globals}
        _refuse_masks(sites)
        loc = [site.pack(self._like[site.name]) for site in self._globals]
        self._nothing = next(iter(self._like.values())).new_zeros(0)
        start = torch.cat([self._nothing, *loc])
        self.flow = None
        if len(start):
            self.flow = whitened_flow(self._make_global_flow, start, self._init_scale)
        self._count = 0
        for plate, names in local.items():
            block = self._make_block(plate, names, trace, args, kwargs, len(start))
            setattr(self, f"rows_{self._count}", block)
            self._count += 1

    def _check_encoders(self, plates: Mapping[str, Any]) -> None:
        (encoders,) = self._encoders
        unknown = set(encoders) - set(plates) if isinstance(encoders, Mapping) else ()
        if unknown:
            raise ValueError(
                f"Expected encoder by the plates of rows, {', '.join(map(repr, plates))}; got "
                f"{next(iter(unknown))!r}."
            )

    def _make_block(
        self,
        plate: str,
        names: Sequence[str],
        trace: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        globals_: int,
    ) -> RowBlock:
        """Makes the encoder and the flow of a plate."""
        sites = [LocalSite.of(name, self.prototype_trace.nodes[name], plate) for name in names]
        features = sum(site.features for site in sites)
        rows = Rows.seen(trace, trace.nodes[names[0]], plate)
        (encoders,) = self._encoders
        chosen = encoders.get(plate) if isinstance(encoders, Mapping) else encoders
        reader = RowReader(self._data, chosen != "rows", self._nothing)
        sources = reader.plan(trace, args, kwargs, rows)
        encoder = make_encoder(chosen, sources, rows, features)
        values = reader.read(trace, args, kwargs, rows) or []
        if isinstance(encoder, RowEncoder):
            encoder.standardize(*values)
        encoding = Encoding(encoder, plate).to(self._nothing)
        with torch.no_grad():
            encodings = encoding.encode(values)
        if not bool(encodings.isfinite().all()):
            raise ValueError(
                f"Expected finite encodings of the rows of plate {plate!r}; got some that are not. "
                "Mask the data that are missing."
            )
        encoded = encodings.shape[-1]
        network = partial(Skip, through=isinstance(encoder, RowTable))
        flow = amortized_flow(self._make_flow, features, encoded + globals_, network)
        return RowBlock(plate, sites, reader, encoding, flow, encoded).to(self._nothing)

    @property
    def blocks(self) -> list[RowBlock]:
        """The conditional flows, one for each plate of rows."""
        return [getattr(self, f"rows_{k}") for k in range(self._count)]

    # A call

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples the latent sites, as a guide with the arguments of the model."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._check_model()
        with ScoredDeltas():
            theta, deltas = self._draw_globals()
            plates = self._given_plates(args, kwargs)
            with torch.no_grad():
                reference = self._rehearse(self._reference(), plates, args, kwargs)
            self._make_plates(reference, plates)
            if not _has_rows(reference, plates):
                # Those of the guide's own trace, where it is replayed.
                with torch.no_grad():
                    reference = self._rehearse(self._reference(), plates, args, kwargs)
            given = {name: delta.v for name, delta in deltas.items()}
            trace = self._rehearse(given, plates, args, kwargs) if given else reference
            run = Run(args, kwargs, plates, trace, reference)
            values = {name: run.sample(name, delta) for name, delta in deltas.items()}
            for block in self.blocks:
                values.update(self._sample_rows(block, theta, run) or self._prior(block, run))
        return values

    def _draw_globals(self) -> tuple[Tensor, dict[str, dist.Delta]]:
        """Draws the globals: the whitened vector, and the point masses of their sites."""
        if self.flow is None:
            return self._nothing, {}
        latent = pyro.sample(
            f"_{module_name(self)}_latent",
            self.flow(path_gradient=True),
            infer={"is_auxiliary": True},
        )
        deltas = {}
        for site, unconstrained in split_vector(self._globals, latent):
            deltas[site.name] = self._place(site, unconstrained, latent.shape[:-1])
        return self.flow.whitening.inverse_and_log_det(latent)[0], deltas

    def _reference(self) -> dict[str, Tensor]:
        """Values of the globals in their middle."""
        if self.flow is None:
            return {}
        pairs = split_vector(self._globals, self.flow.whitening.loc.detach())
        return {site.name: site.transform(unconstrained) for site, unconstrained in pairs}

    def _place(self, site: LatentSite, unconstrained: Tensor, batch: torch.Size) -> dist.Delta:
        """The point mass of a global site, whose plates take the place of empty dimensions."""
        fn = self.prototype_trace.nodes[site.name]["fn"]
        draws = batch[: max(len(batch) - len(fn.batch_shape), 0)]
        placed = unconstrained.reshape(draws + site.unconstrained_shape)
        value = site.transform(placed)
        log_det = site.log_det(placed, value)
        inside = log_det.dim() - value.dim() + fn.event_dim
        return dist.Delta(value, -sum_rightmost(log_det, inside), fn.event_dim)

    def _given_plates(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The plates that come from the user, or from a guide around this one."""
        if self.master is not None:
            return self.master().plates
        if self.create_plates is None:
            return {}
        made = self.create_plates(*args, **kwargs)
        plates = [made] if isinstance(made, pyro.plate) else list(made)
        return {plate.name: plate for plate in plates}

    def _rehearse(
        self, values: Mapping[str, Tensor], plates: Mapping[str, Any], args: Any, kwargs: Any
    ) -> Any:
        rows = {name: plate.indices for name, plate in plates.items()}
        # Priors of rows depend on the globals; without these, nothing here needs a gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(values)):
            return rehearse(self.model, args, kwargs, values, self._like, rows)

    def _make_plates(self, trace: Any, plates: dict[str, Any]) -> None:
        """Makes the plates of a rehearsal, with the same rows."""
        for frame in plate_frames(trace):
            if frame.name not in plates:
                known = frame.name in trace.nodes
                rows = {"subsample": trace.nodes[frame.name]["value"]} if known else {}
                size = frame.full_size if known else None
                plates[frame.name] = pyro.plate(frame.name, size, dim=frame.dim, **rows)

    def _sample_rows(self, block: RowBlock, theta: Tensor, run: Run) -> dict[str, Tensor]:
        """Samples the sites of a plate's rows; none where the rows have no data."""
        rows = Rows.seen(run.trace, run.trace.nodes[block.sites[0].name], block.plate)
        data = block.reader.read(run.reference, run.args, run.kwargs, rows)
        if data is None:
            return {}
        encoding, name = block.encode(data), f"_{module_name(self)}_{block.plate}"
        with run.plates[block.plate]:
            distribution = block.distribution(encoding, theta, rows)
            latent = pyro.sample(f"{name}_latent", distribution, infer={"is_auxiliary": True})
        values, centring = {}, block.centre(encoding, rows)
        for name, u in block.split(latent, rows).items():
            coordinates = Coordinates(run.trace.nodes[name], run.reference.nodes[name])
            value, log_det = coordinates.value_and_log_det(u, centring[name])
            values[name] = run.sample(name, dist.Delta(value, -log_det, coordinates.event_dim))
        return values

    def _prior(self, block: RowBlock, run: Run) -> dict[str, Tensor]:
        """Samples the sites of rows without data from the prior, one after another."""
        given = {name: node["value"] for name, node in run.trace.nodes.items() if name in self._own}
        values: dict[str, Tensor] = {}
        for site in block.sites:
            trace = self._rehearse({**given, **values}, run.plates, run.args, run.kwargs)
            values[site.name] = run.sample(site.name, trace.nodes[site.name]["fn"])
        return values

    # Draws

    @torch.no_grad()
    def sample(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws the sites of all rows that the model sees at some arguments.

        Args:
            n: How many draws.
            args: Positional arguments of the model.
            kwargs: Keyword arguments of the model.

        Returns:
            For each latent site a tensor of shape ``(n, *site_shape)``.

        Raises:
            ValueError: If ``n`` is not positive.
        """
        check_size("n", n)
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with poutine.block(), pyro.plate("_draws", n, dim=-self._depth - 1):
            values = self(*args, **kwargs)
        return {name: self._without_gaps(name, value) for name, value in values.items()}

    def _without_gaps(self, name: str, value: Tensor) -> Tensor:
        """A value without the empty dimensions between those of draws and its own."""
        own = len(self.prototype_trace.nodes[name]["fn"].batch_shape)
        return value.reshape(len(value), *value.shape[1 + self._depth - own :])

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior medians of each entry by Monte Carlo, at the arguments of the model."""
        found = self.quantiles([0.5], *args, **kwargs)
        return {name: values[0] for name, values in found.items()}

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles of each entry by Monte Carlo, at the arguments of the model.

        Args:
            quantiles: Levels between 0 and 1.
            args: Positional arguments of the model.
            kwargs: Keyword arguments of the model.

        Returns:
            For each site a tensor of shape ``(len(quantiles), *site_shape)``.
        """
        draws = self.sample(1000, *args, **kwargs)
        levels = torch.as_tensor(quantiles).to(self._nothing)
        return {name: value.quantile(levels, dim=0) for name, value in draws.items()}


def _has_rows(trace: Any, plates: Mapping[str, Any]) -> bool:
    """Whether the plates of a guide have the rows of a trace: the very tensors, so that no values
    are read."""
    return all(
        plate.indices is trace.nodes[name]["value"]
        for name, plate in plates.items()
        if name in trace.nodes
    )


def _check_plates(plates: Any) -> list[str] | None:
    if plates is None:
        return None
    names = list(plates) if isinstance(plates, Sequence) else plates
    if isinstance(plates, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"Expected plates to be a sequence of names; got {plates!r}.")
    return list(names)


def _local_sites(
    nodes: Mapping[str, Any], trace: Any, chosen: Sequence[str] | None
) -> dict[str, list[str]]:
    """The latent sites of each plate of rows."""
    subsampled = {f.name for f in plate_frames(trace) if f.full_size and f.full_size != f.size}
    plates = set(_find_plates(nodes, trace, subsampled) if chosen is None else chosen)
    local: dict[str, list[str]] = {}
    for name, node in nodes.items():
        around = list(plates_of(node))
        own = next((plate for plate in around if plate in plates), None)
        other = [plate for plate in around if plate in subsampled and plate != own]
        if other:
            raise ValueError(
                f"Expected latent sites in one subsampled plate at most, which is among those of "
                f"rows; got {name!r} in {', '.join(map(repr, around))}."
            )
        if own is not None:
            local.setdefault(own, []).append(name)
    empty = sorted(plates - set(local))
    if empty or not local:
        raise ValueError(
            "Expected a plate of rows with latent sites of their own; got "
            + (f"{empty[0]!r} without." if empty else "none. Use AutoFlow for this model.")
        )
    return local


def _find_plates(nodes: Mapping[str, Any], trace: Any, subsampled: set[str]) -> set[str]:
    around = {plate for node in nodes.values() for plate in plates_of(node)}
    if around & subsampled:
        return around & subsampled
    observed = {p for name in observed_names(trace) for p in plates_of(trace.nodes[name])}
    return around & observed


def _refuse_discrete(nodes: Mapping[str, Any]) -> None:
    for name, node in nodes.items():
        if is_discrete(node):
            raise ValueError(
                f"Expected continuous latent sites; got the discrete {name!r}. Enumerate it, and "
                f"hide it from the guide: AutoAmortizedFlow(poutine.block(model, hide=[{name!r}]))."
            )


def _refuse_masks(sites: Sequence[LatentSite]) -> None:
    for site in sites:
        if not site.complete:
            raise ValueError(
                f"Expected latent sites without masks; got {site.name!r} with one. A mask of "
                "observed sites is welcome, by poutine.mask or the distribution's mask()."
            )
