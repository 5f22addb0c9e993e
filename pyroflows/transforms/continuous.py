"""Continuous flows: the map is the solution of a differential equation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import caller_level, check_positive, check_size
from .._compat import transforming
from .._wording import unstopped
from ..nn import MLP
from ._inputs import admit, set_aside
from ._jacobian import Feedforward, Jacobian, check_trace, trace_rule
from .base import Transform

__all__ = ["ContinuousFlow"]

#: With ``trace="auto"`` and more than two hidden layers the trace is exact up to this many entries.
EXACT_FEATURES = 32

#: Solvers that choose their steps, and most steps they may take.
_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
_MOST_STEPS = 1000

#: Solvers of equal steps, with their number of steps, and midpoints per step of the extrapolated one.
_FIXED = {"rk4": 16, "gbs": 4}
#: Steps of "gbs" in the place of those that an adaptive solver would choose, where none can.
_UNREAD = 8
#: Steps of "gbs" where an adaptive solver comes to no end.
_AT_LAST = 64
_READS = "an adaptive solver reads from the device how far to step"
_MIDPOINTS = (2, 4, 6, 8, 10)

Derivative = Callable[[Any, Tensor], Tensor]
#: What is integrated beside the path, from the velocity and its Jacobian.
Rates = Callable[[Tensor, Jacobian], Sequence[Tensor]]
Rule = Callable[[Feedforward], Rates]


class ContinuousFlow(Transform):
    r"""A continuous flow (FFJORD): the base is carried to the event by the velocity :math:`v` of a network.

    .. math:: \frac{dz}{dt} = v(z, t; c), \quad x = z(0), \quad y = z(1), \quad
        \log|\det J| = \int_0^1 \operatorname{tr} \frac{\partial v}{\partial z}\, dt.

    Each direction is one solve of the differential equation, so that neither is fast, and one is
    the inverse of the other to within the solver's tolerance. The flow starts at the identity.

    Up to two hidden layers the exact trace costs no more than a layer of the network, whatever the
    number of features. With more it costs ``features`` passes, and is replaced for large vectors
    *in training mode* by Hutchinson's unbiased estimate, with random signs from torch's global
    generator, fixed over a solve. In evaluation mode the trace is always exact.

    The adaptive solvers are those of torchdiffeq, an optional dependency. They hold *each* point of
    a batch to the tolerance, and choose their steps on the host, which ``torch.compile`` cannot
    follow; under the transforms of ``torch.func``, eight steps of ``"gbs"`` take their place.
    ``"rk4"`` and ``"gbs"`` (the extrapolation of Gragg, Bulirsch and Stoer, of order ten, near the
    rounding error on smooth paths) take equal steps, need nothing more and work everywhere; they
    keep no tolerance, and rough paths ask for more steps.

    Args:
        features: Entries of the vector.
        context_features: Entries of the context :math:`c`, or ``None``.
        context_shape: Shape of the context, of which ``context_features`` is the short form for
            vectors.
        hidden: Widths of the network of the velocity, to which time is one more input.
        activation: Its activation, a callable without arguments that makes a smooth elementwise
            module. ``Tanh`` bounds the velocity, so that no path escapes, however large the
            weights.
        trace: ``"exact"``, ``"hutchinson"`` or ``"auto"``: exact up to two hidden layers or 32
            entries.
        solver: ``"dopri5"``, ``"dopri8"``, ``"bosh3"`` or ``"adaptive_heun"`` with steps by
            tolerance; ``"rk4"`` or ``"gbs"`` with equal steps.
        rtol: Relative tolerance of an adaptive solver; not below a few roundings.
        atol: Absolute tolerance.
        steps: Number of equal steps; 16 for ``"rk4"`` and 4 for ``"gbs"`` by default.
        adjoint: Whether gradients come from solving the adjoint equation backwards, whose memory
            does not grow with the steps; for adaptive solvers. They are then within the solver's
            tolerance and of first order only.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a size or tolerance is not positive, a word is unknown, or options contradict
            each other.
        ImportError: If the solver needs torchdiffeq and it is not installed.
        RuntimeError: When a call with an adaptive solver is traced.

    Warns:
        UserWarning: When called, if an adaptive solver comes to no end in a thousand steps. Equal
            ones carry the batch then, out of the tolerance.

    Reference:
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD: Free-form continuous dynamics
        for scalable reversible generative models", 2019, https://arxiv.org/abs/1810.01367

    Example:
        >>> t = ContinuousFlow(3, context_features=2, solver="rk4")
        >>> t.condition(torch.zeros(2))(torch.ones(5, 3)).shape
        torch.Size([5, 3])
    """

    vectors_only = True
    fast = "neither"

    def __init__(
        self,
        features: int,
        context_features: int | None = None,
        *,
        context_shape: Sequence[int] | None = None,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.Tanh,
        trace: str = "auto",
        solver: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        steps: int | None = None,
        adjoint: bool = False,
    ) -> None:
        super().__init__(features, context_features, context_shape=context_shape)
        n = self.features
        self.network = MLP(n + 1, n, self.context_features, hidden=hidden, activation=activation)
        self.network.start_at(torch.zeros(n))
        self.trace = check_trace(trace)
        self.solver = _check_solver(solver)
        self.rtol, self.atol = check_positive("rtol", rtol), check_positive("atol", atol)
        self.adjoint = _check_adjoint(adjoint, solver)
        self.steps = _check_steps(steps, solver)

    @property
    def accuracy(self) -> float:
        """Relative error that the solver may leave, for :mod:`pyroflows.testing`; solvers of fixed steps keep none."""
        return 1e-6 if self.solver in _FIXED else 100 * max(self.rtol, self.atol)

    @property
    def exempt_laws(self) -> dict[str, str]:  # type: ignore[override]
        """What an adaptive solver cannot keep, for :mod:`pyroflows.testing`."""
        return {} if self.solver in _FIXED else dict.fromkeys(("compiles", "devices"), _READS)

    @property
    def _exact(self) -> bool:
        cheap = len(self.network.layers) <= 2 or self.features <= EXACT_FEATURES
        return self.trace == "exact" or (self.trace == "auto" and cheap) or not self.training

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._carry(x, context, 0.0, 1.0)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._carry(y, context, 1.0, 0.0)

    def _carry(
        self, x: Tensor, context: Tensor | None, start: float, stop: float
    ) -> tuple[Tensor, Tensor]:
        x, context = set_aside(self, x, context)
        rule = _exact_trace if self._exact else _estimated_trace(torch.randn_like(x).sign())
        moved, (log_det,) = self._solve(x, context, start, stop, rule, 1)
        return moved, log_det

    def path_energy(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""What regularises the path that ends at ``y``: its kinetic energy and the energy of the velocity's Jacobian.

        .. math:: \int_0^1 \| v \|^2 dt, \qquad \int_0^1 \| \partial v / \partial z \|_F^2 \, dt.

        A loss with a little of their means,
        ``-log_prob.mean() + 0.01 * kinetic.mean() + 0.01 * jacobian.mean()``, keeps paths straight
        and solves cheap. The second is an unbiased estimate with random signs from torch's global
        generator.

        Args:
            y: Points of shape ``(*, features)``, on the side of the event.
            context: Context of shape ``(*, *context_shape)``.

        Returns:
            Two tensors of shape ``(*)``.

        Reference:
            Finlay, Jacobsen, Nurbekyan, Oberman, "How to train your neural ODE: the world of
            Jacobian and kinetic regularization", 2020, https://arxiv.org/abs/2002.02798
        """
        y, context = set_aside(self, *admit(self, "y", y, self.event_shape, context))
        _, (kinetic, jacobian) = self._solve(
            y, context, 1.0, 0.0, _energies(torch.randn_like(y).sign()), 2
        )
        return -kinetic, -jacobian

    # The differential equation

    def _network(self, context: Tensor | None) -> tuple[Feedforward, Tensor]:
        """The velocity at time zero, and how fast time moves its first layer."""
        network, n = Feedforward.of(self.network, self.read_context(context)), self.features
        first = network.weights[0]
        return network._replace(weights=(first[:, :n], *network.weights[1:])), first[:, n]

    def _solve(
        self,
        x: Tensor,
        context: Tensor | None,
        start: float,
        stop: float,
        rule: Rule,
        quantities: int,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Where the path through ``x`` arrives, and the integrals along it."""
        n = self.features

        def at_context() -> Derivative:
            network, drift = self._network(context)
            rates, (shift, *shifts) = rule(network), network.shifts

            def derivative(progress: Any, state: Tensor) -> Tensor:
                time = start + progress * (stop - start)
                now = network._replace(shifts=(shift + time * drift, *shifts))
                velocity, jacobian = now.linearise(state[..., :n])
                integrands = [
                    rate.expand(velocity.shape[:-1]).unsqueeze(-1)
                    for rate in rates(velocity, jacobian)
                ]
                return (stop - start) * torch.cat([velocity, *integrands], -1)

            return derivative

        state = torch.cat([x, x.new_zeros((*x.shape[:-1], quantities))], -1)
        if self.solver in _FIXED or not state.numel():
            state = _equal_steps(at_context(), state, self.solver, self.steps)
        elif transforming() and not torch.compiler.is_compiling():
            state = _equal_steps(at_context(), state, "gbs", _UNREAD)
        else:
            # The steps suit the worst point, so that a single NaN would end them for all.
            lost = ~state.isfinite().all(-1, keepdim=True)
            state = self._adaptive_steps(at_context, state.masked_fill(lost, 0.0), context)
            state = state.masked_fill(lost, torch.nan)
        return state[..., :n], state[..., n:].unbind(-1)

    def _adaptive_steps(
        self, at_context: Callable[[], Derivative], state: Tensor, context: Tensor | None
    ) -> Tensor:
        from torchdiffeq import odeint, odeint_adjoint

        if torch.jit.is_tracing():
            raise RuntimeError(
                f"The adaptive solver {self.solver!r} of ContinuousFlow cannot be traced, because "
                "its steps depend on the values. Use solver='rk4', or an ELBO that is not jitted, such as Trace_ELBO."
            )
        rounding = 8 * torch.finfo(state.dtype).eps
        common: dict[str, Any] = {"max_num_steps": _MOST_STEPS, "norm": _largest}
        # The last step ends at the end; without a fixed end the solver interpolates, at a lower order.
        options = {**common, "step_t": state.new_ones(1)}
        given: dict[str, Any] = {
            "rtol": max(self.rtol, rounding),
            "atol": max(self.atol, rounding),
            "method": self.solver,
        }
        progress = state.new_tensor([0.0, 1.0])
        try:
            if not self.adjoint:
                return odeint(at_context(), state, progress, options=options, **given)[-1]
            learnt = [*self.network.parameters(), *([] if context is None else [context])]
            return odeint_adjoint(
                # The adjoint asks for gradients with respect to these very tensors, so nothing may be computed beforehand.
                lambda progress, state: at_context()(progress, state),
                state,
                progress,
                options=options,
                adjoint_params=[tensor for tensor in learnt if tensor.requires_grad],
                adjoint_options={**common, "norm": "seminorm", "step_t": state.new_zeros(1)},
                **given,
            )[-1]
        except AssertionError as error:
            warnings.warn(
                f"The solver {self.solver} of {type(self).__name__} gives up ({unstopped(error)}), "
                f"so {_AT_LAST} equal steps carry this batch, out of its tolerance. Are the parameters "
                "and points of usual sizes, and the tolerances no smaller than they need be?",
                stacklevel=caller_level(),
            )
            return _equal_steps(at_context(), state, "gbs", _AT_LAST)

    def extra_repr(self) -> str:
        how = f"rtol={self.rtol}, atol={self.atol}" if self.steps is None else f"steps={self.steps}"
        return f"{super().extra_repr()}, trace={self.trace!r}, solver={self.solver!r}, {how}, adjoint={self.adjoint}"


def _exact_trace(network: Feedforward) -> Rates:
    trace = trace_rule(network.weights)
    return lambda velocity, jacobian: [trace(jacobian.slopes)]


def _estimated_trace(noise: Tensor) -> Rule:
    return lambda network: lambda velocity, jacobian: [(jacobian.pull(noise) * noise).sum(-1)]


def _energies(noise: Tensor) -> Rule:
    return lambda network: (
        lambda velocity, jacobian: [
            velocity.square().sum(-1),
            jacobian.pull(noise).square().sum(-1),
        ]
    )


def _equal_steps(derivative: Derivative, state: Tensor, solver: str, steps: int | None) -> Tensor:
    step = _extrapolated if solver == "gbs" else _runge_kutta
    steps = steps or 1
    for i in range(steps):
        state = state + step(derivative, i / steps, state, 1 / steps)
    return state


def _runge_kutta(f: Derivative, t: float, z: Tensor, h: float) -> Tensor:
    """The increment of the classical method of order four."""
    k1 = f(t, z)
    k2 = f(t + h / 2, z + h / 2 * k1)
    k3 = f(t + h / 2, z + h / 2 * k2)
    k4 = f(t + h, z + h * k3)
    return h / 6 * (k1 + 2 * (k2 + k3) + k4)


def _extrapolated(f: Derivative, t: float, z: Tensor, h: float) -> Tensor:
    r"""The increment of Gragg's midpoint rule, extrapolated to steps of no length.

    For an even number of midpoints its error is a series in even powers of their distance, whose
    first terms the weights :math:`\prod_{m \ne n} n^2 / (n^2 - m^2)` cancel.
    """
    first = f(t, z)
    total = torch.zeros_like(z)
    for n in _MIDPOINTS:
        weight = 1.0
        for m in _MIDPOINTS:
            weight *= 1.0 if m == n else n * n / (n * n - m * m)
        before, moved = torch.zeros_like(z), h / n * first
        for i in range(1, n):
            before, moved = moved, before + 2 * h / n * f(t + i * h / n, z + moved)
        total = total + weight * moved
    return total


def _largest(values: Tensor) -> Tensor:
    return values.abs().max()


def _check_solver(value: Any) -> str:
    if value not in (*_ADAPTIVE, *_FIXED):
        raise ValueError(
            f"Expected solver to be one of {', '.join((*_ADAPTIVE, *_FIXED))}; got {value!r}."
        )
    if value in _ADAPTIVE:
        try:
            import torchdiffeq  # noqa: F401
        except ImportError:
            raise ImportError(
                f'The solver {value!r} needs torchdiffeq; install it with pip install "pyroflows[continuous]", or choose '
                f"solver='rk4', which needs nothing more."
            ) from None
    return str(value)


def _check_steps(value: Any, solver: str) -> int | None:
    if solver in _FIXED:
        return check_size("steps", _FIXED[solver] if value is None else value)
    if value is not None:
        raise ValueError(
            f"Expected steps for a solver of equal steps ({', '.join(_FIXED)}) only; got solver={solver!r}."
        )
    return None


def _check_adjoint(value: Any, solver: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"Expected adjoint to be True or False; got {value!r}.")
    if value and solver in _FIXED:
        raise ValueError(
            f"Expected adjoint=True with an adaptive solver ({', '.join(_ADAPTIVE)}) only; got {solver!r}."
        )
    return value
