"""Models that cannot be fitted, each with the words that its error must hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Problem = tuple[Callable[..., Any], Any]
HOSTILE: dict[str, tuple[Callable[[], Problem], tuple[str, ...]]] = {}

N = 20
X = torch.linspace(-1.0, 1.0, N)
Y = 2 * X + 0.3 * torch.sin(37 * X)


def hostile(*words: str) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
    """Registers a model; its error must hold the words."""

    def register(make: Callable[[], Problem]) -> Callable[[], Problem]:
        HOSTILE[make.__name__] = (make, words)
        return make

    return register


def slope() -> Tensor:
    return pyro.sample("w", dist.Normal(0.0, 1.0))


# Data


@hostile("'groups'", "none in itself")
def plate_nested_in_itself() -> Problem:
    def model() -> None:
        with pyro.plate("groups", 3), pyro.plate("groups", 3):
            slope()

    return model, ()


@hostile("'n'", "no rows")
def no_rows() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (torch.zeros(0),)


@hostile("'y'", "(20, 3)", "(20,)")
def three_columns_in_a_plate() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (torch.zeros(N, 3),)


@hostile("'n'", "300 rows", "(50,)", "DataLoader")
def batch_in_a_plate() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", 300, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (torch.randn(50),)


@hostile("'n'", "300 rows", "DataLoader")
def batch_with_columns_in_a_plate() -> Problem:
    def model(x, y):
        mu = slope() * x
        with pyro.plate("n", 300, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (torch.randn(50), torch.randn(50))


@hostile("'y'", "(50,)", "300")
def plate_larger_than_the_data() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", 300):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (torch.randn(50),)


@hostile("'y'", "'n'")
def plate_larger_than_the_mean() -> Problem:
    def model(x, y):
        w = slope()
        with pyro.plate("n", 30):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    return model, (X, Y)


@hostile("'y'", "nan")
def nan_rows() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (torch.where(X > 0.8, torch.nan, Y),)


@hostile("'y'", "inf")
def infinite_rows() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (torch.where(X > 0.8, torch.inf, Y),)


@hostile("'y'", "nan")
def nan_inputs() -> Problem:
    def model(x, y):
        w = slope()
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    return model, (torch.where(X > 0.8, torch.nan, X), Y)


@hostile("'y'", "(20, 2)", "event")
def columns_of_a_multivariate_normal() -> Problem:
    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("n", N):
            pyro.sample("y", dist.MultivariateNormal(mu, torch.eye(3)), obs=y)

    return model, (torch.zeros(N, 2),)


@hostile("'y'", "list")
def a_list_is_observed() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", 2):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, ([0.1, 0.2],)


@hostile("'y'", "ndarray", "torch.as_tensor")
def an_array_is_observed() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (Y.numpy(),)


@hostile("'y'", "str")
def a_string_is_observed() -> Problem:
    def model(y):
        pyro.sample("y", dist.Normal(slope(), 1.0), obs=y)

    return model, ("0.3",)


@hostile("'y'", "function")
def a_function_is_observed() -> Problem:
    def model(y):
        pyro.sample("y", dist.Normal(slope(), 1.0), obs=y)

    return model, (lambda: 0.3,)


@hostile("'y'", "complex")
def complex_numbers_are_observed() -> Problem:
    def model(y):
        pyro.sample("y", dist.Normal(slope(), 1.0), obs=y)

    return model, (torch.tensor(1j),)


@hostile("'y'", "meta")
def a_tensor_without_numbers_is_observed() -> Problem:
    def model(y):
        pyro.sample("y", dist.Normal(slope(), 1.0), obs=y)

    return model, (torch.zeros((), device="meta"),)


@hostile("'y'", "bool")
def truths_of_a_bernoulli() -> Problem:
    def model(y):
        pyro.sample("y", dist.Bernoulli(logits=slope()), obs=y)

    return model, (torch.tensor(True),)


def categories(k: torch.Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("n", 3):
        pyro.sample("k", dist.Categorical(p), obs=k)


@hostile("'k'", "outside of")
def counts_beyond_their_categories() -> Problem:
    return categories, (torch.tensor([0, 1, 3]),)


@hostile("'k'", "outside of")
def float_categories() -> Problem:
    return categories, (torch.tensor([0.0, 1.0, 0.5]),)


@hostile("'p'", "outside of")
def shares_that_do_not_sum_to_one() -> Problem:
    def model(p):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("n", 2):
            pyro.sample("p", dist.Dirichlet(a), obs=p)

    return model, (torch.tensor([[0.2, 0.3, 0.4], [0.2, 0.3, 0.5]]),)


@hostile("'n'")
def a_plate_of_negative_size() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", -3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (Y,)


@hostile("'n'")
def a_plate_of_half_a_row() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", 2.5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (Y,)


@hostile("'y'", "mask")
def a_column_as_mask() -> Problem:
    def model(y, seen):
        mu = slope()
        with pyro.plate("n", N), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, (Y, (X > 0)[:, None])


@hostile("'y'", "obs_mask")
def a_mask_of_another_size() -> Problem:
    def model(y, seen):
        mu = slope()
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    return model, (Y, torch.ones(3).bool())


@hostile("'n'", "20 rows")
def a_loader_whose_plate_counts_a_batch() -> Problem:
    def model(y):
        mu = slope()
        with pyro.plate("n", 30, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, DataLoader(TensorDataset(Y), batch_size=5)


# Parameters of distributions


@hostile("'y'", "scale", "-1")
def negative_scale() -> Problem:
    def model():
        pyro.sample("y", dist.Normal(slope(), -1.0), obs=torch.tensor(0.0))

    return model, ()


@hostile("'y'", "scale", "1 of 20")
def one_scale_of_zero() -> Problem:
    def model(y):
        w = slope()
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal(w, (torch.arange(N) - 3.0).abs()), obs=y)

    return model, (Y,)


@hostile("'p'", "concentration")
def negative_concentration() -> Problem:
    def model():
        pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, -1.0])))

    return model, ()


@hostile("'u'", "low")
def a_uniform_upside_down() -> Problem:
    def model():
        pyro.sample("u", dist.Uniform(1.0, 0.0))

    return model, ()


@hostile("'y'")
def a_covariance_that_is_not_positive() -> Problem:
    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample(
            "y",
            dist.MultivariateNormal(
                mu,
                -torch.eye(2),
            ),
            obs=y,
        )

    return model, (torch.zeros(2),)


@hostile("'y'", "probs")
def probabilities_above_one() -> Problem:
    def model():
        pyro.sample("y", dist.Bernoulli(slope().exp() + 1), obs=torch.tensor(1.0))

    return model, ()


@hostile("'y'", "total_count")
def a_binomial_with_a_continuous_count() -> Problem:
    def model():
        count = pyro.sample("count", dist.Gamma(20.0, 1.0))
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("y", dist.Binomial(count, p), obs=torch.tensor(3.0))

    return model, ()


@hostile("'count'", "discrete")
def a_binomial_with_a_poisson_count() -> Problem:
    def model():
        count = pyro.sample("count", dist.Poisson(20.0))
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("y", dist.Binomial(count, p), obs=torch.tensor(3.0))

    return model, ()


@hostile("'k'", "enumerate")
def a_latent_binomial_with_a_latent_count() -> Problem:
    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        count = pyro.sample("count", dist.Categorical(torch.ones(4)))
        k = pyro.sample("k", dist.Binomial(count, p))
        pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(1.0))

    return model, ()


@hostile("'y'", "loc")
def a_distribution_without_its_arguments() -> Problem:
    def model():
        slope()
        pyro.sample("y", dist.Normal(), obs=torch.tensor(0.0))

    return model, ()


@hostile("'y'")
def means_and_scales_of_two_sizes() -> Problem:
    def model(y):
        w = slope()
        pyro.sample("y", dist.Normal(w * X, torch.ones(3)), obs=y)

    return model, (Y,)


@hostile("'y'", "reinterpreted_batch_ndims")
def an_event_too_many() -> Problem:
    def model(y):
        pyro.sample("y", dist.Normal(slope(), 1.0).to_event(1), obs=y)

    return model, (torch.tensor(0.3),)


@hostile("'y'", "(4)", "(3)")
def inputs_of_another_width() -> Problem:
    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal((torch.ones(N, 4) * w).sum(-1), 1.0), obs=y)

    return model, (Y,)


@hostile("'w'", "inplace")
def a_latent_changed_in_place() -> Problem:
    def model(y):
        w = slope()
        w += 1
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    return model, (torch.tensor(0.3),)


@hostile("'bias'")
def a_parameter_without_value() -> Problem:
    def model():
        return slope() + pyro.param("bias")

    return model, ()


# Names and sizes


@hostile("'w'")
def duplicate_names() -> Problem:
    def model():
        slope()
        slope()

    return model, ()


@hostile("3")
def a_number_as_name() -> Problem:
    def model():
        pyro.sample(3, dist.Normal(0.0, 1.0))

    return model, ()


@hostile("''")
def an_empty_name() -> Problem:
    def model():
        pyro.sample("", dist.Normal(0.0, 1.0))

    return model, ()


@hostile("3")
def a_number_as_name_of_a_plate() -> Problem:
    def model():
        with pyro.plate(3, N):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    return model, ()


@hostile("'x'", "float")
def a_number_as_distribution() -> Problem:
    def model():
        pyro.sample("x", 1.0)

    return model, ()


@hostile("'x'", "Normal")
def a_class_as_distribution() -> Problem:
    def model():
        pyro.sample("x", dist.Normal)

    return model, ()


@hostile("'x'", "torch.distributions")
def a_distribution_of_torch() -> Problem:
    def model():
        pyro.sample("x", torch.distributions.Normal(0.0, 1.0))

    return model, ()


@hostile("'x'", "1000000000000")
def a_latent_without_bounds() -> Problem:
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([10**12]).to_event(1))

    return model, ()


@hostile("'x'", "100000")
def a_square_latent_without_bounds() -> Problem:
    def model():
        with pyro.plate("rows", 10**6, dim=-2), pyro.plate("columns", 10**6, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    return model, ()


@hostile("'y'", "memory")
def memory_that_there_is_not() -> Problem:
    def model():
        pyro.sample("y", dist.Normal(slope() * torch.ones(10**14), 1.0), obs=torch.tensor(0.0))

    return model, ()


@hostile("'u'", "depends on other latent sites")
def a_support_that_moves() -> Problem:
    def model():
        width = pyro.sample("width", dist.Gamma(2.0, 1.0))
        pyro.sample("u", dist.Uniform(0.0, width))

    return model, ()


@hostile("'x'")
def a_shape_that_moves() -> Problem:
    def model():
        w = slope()
        size = 2 if w > 0.5 else 3
        pyro.sample("x", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    return model, ()


@hostile("'c'")
def a_support_without_bijection() -> Problem:
    def model():
        pyro.sample("c", dist.ImproperUniform(constraints.square, (), (2, 2)))

    return model, ()


@hostile("without sample sites")
def an_empty_model() -> Problem:
    return lambda: None, ()


@hostile("generator")
def a_generator() -> Problem:
    def model():
        yield slope()

    return model, ()


@hostile("y", "0 in args")
def an_argument_too_few() -> Problem:
    return lambda y: pyro.sample("y", dist.Normal(slope(), 1.0), obs=y), ()


@hostile("'w'", "observed")
def everything_observed() -> Problem:
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    return model, ()


@hostile("'z'", "'n'")
def a_latent_of_another_size_than_its_plate() -> Problem:
    def model():
        with pyro.plate("n", 3):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))

    return model, ()


@hostile("'n'")
def a_plate_in_itself() -> Problem:
    def model():
        with pyro.plate("n", 3), pyro.plate("n", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return model, ()


@hostile("collide")
def two_plates_in_one_dimension() -> Problem:
    def model():
        with pyro.plate("a", 3, dim=-1), pyro.plate("b", 4, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return model, ()


@hostile("'gone'")
def a_reparametrisation_of_what_has_no_scale() -> Problem:
    def model():
        pyro.sample("gone", dist.Gamma(1.0, 1.0))

    return poutine.reparam(model, config={"gone": LocScaleReparam(0.0)}), ()


# What the user's own code raises


@hostile("KeyError", "age", "'w'")
def a_key_error() -> Problem:
    def model(data):
        w = slope()
        mean = w * data["age"]
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.0))

    return model, ({},)


@hostile("AttributeError", "'y'")
def an_attribute_error() -> Problem:
    def model():
        w = slope()
        pyro.sample("y", dist.Normal(w.mu, 1.0), obs=torch.tensor(0.0))

    return model, ()


@hostile("RuntimeError", "first second", "'w'")
def an_error_of_several_lines() -> Problem:
    def model():
        slope()
        raise RuntimeError("first\nsecond\n\nthird")

    return model, ()


@hostile("MemoryError", "before its first site")
def an_error_without_words() -> Problem:
    def model():
        raise MemoryError

    return model, ()


@hostile("ZeroDivisionError")
def a_division_by_zero() -> Problem:
    def model():
        return slope() * (1 / 0)

    return model, ()


@hostile("RecursionError")
def a_model_without_end() -> Problem:
    def model():
        model()

    return model, ()


@hostile("Odd", "stop here", "'w'")
def an_error_of_ones_own() -> Problem:
    class Odd(Exception):
        pass

    def model():
        slope()
        raise Odd("stop here")

    return model, ()


@hostile("Mute", "before its first site")
def an_error_that_cannot_be_told() -> Problem:
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    def model():
        raise Mute

    return model, ()


@hostile("StopIteration")
def a_stop() -> Problem:
    def model():
        slope()
        next(iter([]))

    return model, ()


@hostile("AssertionError", "'w'")
def an_assertion() -> Problem:
    def model():
        w = slope()
        assert w.dim() == 1

    return model, ()


@hostile("'w'", "size mismatch")
def a_product_of_two_sizes() -> Problem:
    def model():
        w = slope()
        torch.ones(2, 3) @ (w * torch.ones(2))

    return model, ()


@hostile("'y'", "dtype")
def a_product_of_two_dtypes() -> Problem:
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    return model, (torch.zeros(N, 3).double(), Y)


@hostile("'y'", "not a number")
def a_distribution_of_ones_own_that_fails() -> Problem:
    class Own(dist.TorchDistribution):
        arg_constraints = {}  # noqa: RUF012
        support = constraints.real

        def log_prob(self, value):
            raise ArithmeticError("not a number")

        def expand(self, batch_shape, _instance=None):
            return self

    def model():
        slope()
        pyro.sample("y", Own(), obs=torch.tensor(0.0))

    return model, ()
