"""The command line, in process on a stand-in for the fit, and once for real."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

import pyroflows
from pyroflows.cli import FLOWS, main
from pyroflows.examples import EXAMPLES
from pyroflows.report.arviz_bridge import load, to_inference_data

MODEL = """
from __future__ import annotations
from dataclasses import dataclass
import pyro, sys, torch
import pyro.distributions as dist
from pyro.nn import PyroModule
import neighbour

@dataclass
class Options:
    scale: float = neighbour.SCALE

LEVEL = 3.0

def model(y, sigma, power=2):
    mu = pyro.sample("mu", dist.Normal(0.0, Options().scale))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)

def nothing():
    pyro.sample("z", dist.Normal(0.0, 1.0))

def anything(**data):
    pyro.sample("z", dist.Normal(0.0, 1.0))

def by_place(a, b=None, /, *, c):
    pyro.sample("z", dist.Normal(0.0, 1.0))

def exits():
    sys.exit(3)

def stops():
    raise KeyboardInterrupt

def counted(x, k):
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    pyro.sample("x", dist.Poisson(rate).expand([2, 2]).to_event(2), obs=x)
    pyro.sample("k", dist.Poisson(rate * torch.ones(2)[k]).to_event(1), obs=k)

def multiplied(x, k):
    scale = pyro.param("scale", torch.ones(2))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), scale).to_event(1))
    pyro.sample("y", dist.Normal((x @ w)[k], 1.0).to_event(1), obs=torch.zeros(2))

def both(x, k):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w + k @ w, 1.0).to_event(1), obs=torch.zeros(2))

def hopeless(x, k):
    raise RuntimeError("no dtype will do")

def broken(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    return y.missing

def misshapen(y):
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Normal(torch.zeros(2), 1.0), obs=y)

class Module(PyroModule):
    def forward(self, y):
        pyro.sample("z", dist.Normal(0.0, 1.0))

module = Module()
"""


class FakeDensity:
    """A density without angles."""

    centres: tuple[str, ...] = ()


class FakePosterior:
    """What the command line asks of a posterior, and no more."""

    density = FakeDensity()
    seconds = 1.25
    name = "flow, 150 steps"

    def __init__(self, interrupted: bool = False) -> None:
        self.interrupted = interrupted
        self.verdict = FakeVerdict()

    def to_arviz(self, draws: int) -> Any:
        return container(draws)

    def save(self, path: Path) -> None:
        path.write_text("posterior")


def container(draws: int) -> Any:
    """Evenly spaced draws in ArviZ's container."""
    even = np.arange(draws) / 32  # without rounding, so that the first interval is the shortest
    theta = np.stack([even / 2**13, even], axis=-1)
    columns = {"mu": even, "theta": theta, "k": np.full(draws, 3.0)}
    return to_inference_data({"posterior": {name: x[None] for name, x in columns.items()}})


class FakeFinding(NamedTuple):
    name: str
    status: str
    value: float | None
    limit: float | None
    sentence: str
    block: str | None = None


class FakeVerdict(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(
            ok=True, elbo=-31.338, log_evidence=-31.2876, log_evidence_error=0.0042, khat=0.517
        )
        self.ess, self.draws = 0.941, 10000
        self.findings = [
            FakeFinding("k-hat", "held", 0.517, 0.7, ""),
            FakeFinding("drift", "failed", 0.25, 0.1, "", block="theta"),
            FakeFinding("modes", "not judged", None, None, "there was no time for a census."),
        ]

    def __str__(self) -> str:
        return "This posterior can be trusted."


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Puts a stand-in in the place of the fit; remembers how it was called."""
    record = SimpleNamespace(calls=[], result=FakePosterior())

    def fit_posterior(model: Any, **options: Any) -> FakePosterior:
        record.calls.append((model, options))
        if isinstance(record.result, BaseException):
            raise record.result
        return record.result

    monkeypatch.setattr(pyroflows, "fit_posterior", fit_posterior)
    return record


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs each test in a folder with a model file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "m.py").write_text(MODEL)
    (tmp_path / "neighbour.py").write_text("SCALE = 2.0\n")
    return tmp_path


def data(**values: Any) -> str:
    Path("data.json").write_text(json.dumps(values))
    return "data.json"


def test_fit_prints_table_verdict_and_figures_and_saves(fit, folder, capsys):
    assert (
        main(["fit", "eight_schools", "--draws", "500", "--seed", "7", "--time-limit", "60"]) == 0
    )
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    assert ["mean", "sd", "hdi_3%", "hdi_97%"] in lines
    assert ["mu", "7.80", "4.52", "0.00", "14.69"] in lines
    assert ["theta[0]", "0.000952", "0.000551", "0.000000", "0.001793"] in lines
    assert ["k", "3.000", "0.000", "3.000", "3.000"] in lines
    for expected in (
        "This posterior can be trusted.",
        "ELBO            -31.34",
        "log evidence    -31.288, Monte Carlo error 0.004",
        "k-hat           0.52",
        "importance ESS  94.1% of 10000 draws",
        "found by        flow, 150 steps",
        "seconds         1.2",
        "k-hat           held: 0.517 (limit 0.7)",
        "drift of theta  failed: 0.25 (limit 0.1)",
        "modes           not judged: there was no time for a census.",
        "Saved eight_schools.nc and eight_schools.png.",
    ):
        assert expected in out
    assert load(folder / "eight_schools.nc")["posterior"]["mu"].shape == (1, 500)
    assert (folder / "eight_schools.png").read_bytes().startswith(b"\x89PNG")
    [(model, options)] = fit.calls
    assert model is EXAMPLES["eight_schools"].model
    assert set(options.pop("kwargs")) == {"y", "sigma"}
    assert options.pop("progress") is True
    assert options == {
        "args": (),
        "guide": "auto",
        "seed": 7,
        "checkpoint": None,
        "time_limit": 60.0,
        "device": None,
    }


def test_the_posterior_is_drawn_once(fit, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        fit.result, "to_arviz", lambda draws: drawn.append(draws) or container(draws)
    )
    assert main(["fit", "funnel", "--draws", "300"]) == 0
    assert drawn == [300]


def test_quiet_prints_the_verdict_alone(fit, folder, capsys):
    assert main(["fit", "funnel", "--quiet"]) == 0
    assert capsys.readouterr().out == "This posterior can be trusted.\n"
    assert (folder / "funnel.nc").exists()
    assert fit.calls[0][1]["progress"] is False


def test_out_names_both_files(fit, folder):
    (folder / "deep").mkdir()
    assert main(["fit", "funnel", "--out", "deep/foo.nc"]) == 0
    assert sorted(path.name for path in (folder / "deep").iterdir()) == ["foo.nc", "foo.png"]
    assert not (folder / "funnel.nc").exists()


@pytest.mark.parametrize("flow", list(FLOWS))
def test_flow_names_a_preset(fit, flow, monkeypatch):
    preset = object()
    monkeypatch.setattr(pyroflows, FLOWS[flow], preset)
    assert main(["fit", "funnel", "--flow", flow]) == 0
    assert fit.calls[0][1]["guide"] is preset


def test_interrupted_fit_is_printed_and_saved(fit, folder, capsys):
    fit.result = FakePosterior(interrupted=True)
    assert main(["fit", "funnel"]) == 130
    assert "Interrupted: this is the best posterior found in 1.2 s." in capsys.readouterr().out
    assert (folder / "funnel.nc").exists()
    assert (folder / "funnel.png").exists()


def test_interrupt_without_a_posterior(fit, folder, capsys):
    fit.result = KeyboardInterrupt()
    assert main(["fit", "funnel"]) == 130
    assert capsys.readouterr().err == "pyroflows: Interrupted.\n"
    assert not (folder / "funnel.nc").exists()


def test_data_become_tensors(fit):
    Path("data.json").write_text(
        '{"f": [1, 2.5], "i": [[1, 2], [3, 4]], "b": [true, false], "none": null, "x": 2.5, "k": 3,'
        ' "yes": true, "word": "a", "nan": [NaN, Infinity, 1], "empty": []}'
    )
    assert main(["fit", "m.py:anything", "--data", "data.json"]) == 0
    kwargs = fit.calls[0][1]["kwargs"]
    expected = {
        "f": torch.tensor([1.0, 2.5]),
        "i": torch.tensor([[1, 2], [3, 4]]),
        "b": torch.tensor([True, False]),
        "nan": torch.tensor([math.nan, math.inf, 1.0]),
        "empty": torch.zeros(0),
    }
    for key, value in expected.items():
        torch.testing.assert_close(kwargs.pop(key), value, equal_nan=True)
    assert kwargs == {"none": None, "x": 2.5, "k": 3, "yes": True, "word": "a"}
    assert isinstance(kwargs["yes"], bool)
    assert isinstance(kwargs["k"], int)


def test_data_follow_the_default_dtype(fit):
    torch.set_default_dtype(torch.float64)
    try:
        assert main(["fit", "m.py:anything", "--data", data(x=[0.1])]) == 0
    finally:
        torch.set_default_dtype(torch.float32)
    assert fit.calls[0][1]["kwargs"]["x"].item() == 0.1


@pytest.mark.parametrize(
    ("name", "values", "args", "kwargs"),
    [
        ("model", {"y": 1, "sigma": 2}, (), {"y": 1, "sigma": 2}),
        ("model", {"y": 1, "sigma": 2, "power": 3}, (), {"y": 1, "sigma": 2, "power": 3}),
        ("by_place", {"c": 3, "b": 2, "a": 1}, (1, 2), {"c": 3}),
        ("by_place", {"c": 3, "a": 1}, (1, None), {"c": 3}),
        ("module", {"y": 1}, (), {"y": 1}),
        ("nothing", {}, (), {}),
    ],
)
def test_models_of_ones_own(fit, folder, name, values, args, kwargs):
    assert main(["fit", f"m.py:{name}", "--data", data(**values)]) == 0
    options = fit.calls[0][1]
    assert (options["args"], options["kwargs"]) == (args, kwargs)
    assert (folder / f"{name}.nc").exists()


def test_a_model_elsewhere_finds_its_neighbours(fit, folder, monkeypatch):
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    monkeypatch.delitem(sys.modules, "neighbour")
    assert main(["fit", "../m.py:nothing"]) == 0


def test_data_replace_those_of_an_example(fit):
    assert main(["fit", "eight_schools", "--data", data(y=[1.0], sigma=[2.0])]) == 0
    kwargs = fit.calls[0][1]["kwargs"]
    assert {key: value.tolist() for key, value in kwargs.items()} == {"y": [1.0], "sigma": [2.0]}


# Name of the test: the arguments after "fit", and what the sentence must say.
MISTAKES = {
    "unknown example": (
        "nine_schools",
        "no example 'nine_schools'; the examples are eight_schools, ",
    ),
    "file without function": ("m.py", "path/to/model.py:function"),
    "no model file": ("gone.py:model", "no model file gone.py"),
    "model file too long": ("f" * 300 + ".py:model", "no model file fff"),
    "folder for a model": (".:model", "no model file ."),
    "not Python by name": ("model.txt:model", "ends in .py; got model.txt"),
    "no function": ("m.py:modle", "no 'modle' in m.py; its functions are anything, both, broken, "),
    "no function at all": ("neighbour.py:model", "no 'model' in neighbour.py, nor any function"),
    "not a function": (
        "m.py:LEVEL",
        "'LEVEL' in m.py to be a function or a PyroModule instance; it is of type float",
    ),
    "a class": ("m.py:Module", "it is a class"),
    "syntax": ("syntax.py:model", "SyntaxError (invalid syntax) at syntax.py, line 2"),
    "import raises": (
        "raises.py:model",
        "NameError (name 'foo' is not defined) at raises.py, line 3",
    ),
    "import exits": ("exits.py:model", "SystemExit (1) at exits.py, line 2"),
    "import lacks": ("lacks.py:model", "No module named 'no_such_thing'"),
    "no data": ("m.py:model", "'model' needs 'y' and 'sigma'; give a JSON file with --data"),
    "missing file": ("m.py:model --data gone.json", "Cannot read --data gone.json: No such file"),
    "folder for data": ("m.py:model --data .", "Cannot read --data .: Is a directory"),
    "out in no folder": (
        "funnel --out no/such/f.nc",
        "Cannot write no/such/f.nc: No such file or directory",
    ),
    "out under a file": ("funnel --out m.py/f.nc", "Cannot write m.py/f.nc: Not a directory"),
    "out is no .nc": ("funnel --out f.png", "ends in .nc; got 'f.png'"),
    "checkpoint is out": (
        "funnel --out f.nc --checkpoint ./f.nc",
        "--checkpoint to name another file than --out",
    ),
    "out is empty": ("funnel --out=", "ends in .nc; got ''"),
    "out is a folder": ("funnel --out folder.nc", "Cannot write folder.nc: Is a directory"),
    "out is a device": ("funnel --out device.nc", "Cannot write device.nc: Not a regular file"),
    "out with a null character": ("funnel --out a\0b.nc", "Cannot write 'a\\x00b.nc': "),
    "data is empty": ("m.py:model --data=", "--data: expected the name of a file, got ''"),
    "a key twice": ("m.py:model --data twice.json", "each key in twice.json once; got 'y' more"),
    "checkpoint is empty": (
        "funnel --checkpoint=",
        "--checkpoint: expected the name of a file, got ''",
    ),
    "checkpoint in no folder": (
        "funnel --checkpoint no/such",
        "Cannot write --checkpoint no/such: No such file or directory",
    ),
    "import ends": ("ends.py:model", "GeneratorExit at ends.py, line 1"),
    "data with a null character": ("m.py:model --data a\0b", "Cannot read --data 'a\\x00b': "),
    "data without end": ("m.py:model --data /dev/zero", "/dev/zero: Not a regular file"),
    "model with a null character": ("a\0b.py:model", "no model file 'a\\x00b.py'"),
    "no function named": ("m.py:", "no '' in m.py"),
    "device is empty": ("funnel --device=", "to name a torch device such as cpu or cuda:0; got ''"),
    "out is too long": ("funnel --out " + "f" * 300 + ".nc", "File name too long"),
    "threads": ("funnel --threads 0", "--threads: expected a positive number of threads, got '0'"),
    "draws": ("funnel --draws 0", "--draws: expected a whole number from 10 to 100000000, got '0'"),
    "draws in words": ("funnel --draws many", "--draws"),
    "seed": ("funnel --seed -1", "--seed"),
    "seed fraction": ("funnel --seed 1.5", "--seed"),
    "time limit": (
        "funnel --time-limit 0",
        "--time-limit: expected a positive number of seconds, got '0'",
    ),
    "time limit nan": ("funnel --time-limit nan", "--time-limit"),
    "time limit inf": ("funnel --time-limit inf", "--time-limit"),
    "time limit in words": ("funnel --time-limit 1m", "--time-limit"),
    "flow": ("funnel --flow cubic", "--flow"),
    "device": ("funnel --device gpu", "to name a torch device such as cpu or cuda:0; got 'gpu'"),
    "device without numbers": ("funnel --device meta", "--device meta"),
    "device not there": ("funnel --device cuda:99", "Cannot compute on --device cuda:99"),
    "option": ("funnel --sed 1", "Unrecognized arguments: --sed 1"),
    "no model": ("", "model"),
}

FILES = {
    "model.txt": "",
    "syntax.py": "x = 1\ndef model(:\n",
    "raises.py": "\n\nfoo.bar\n",
    "exits.py": "import sys\nsys.exit(1)",
    "ends.py": "raise GeneratorExit",
    "twice.json": '{"y": [1.0], "sigma": 1.0, "y": [2.0]}',
    "lacks.py": "import no_such_thing",
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_are_told_before_the_fit(fit, folder, capsys, mistake):
    arguments, sentence = MISTAKES[mistake]
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "folder.nc").mkdir()
    os.mkfifo(folder / "device.nc")
    before = {path.name for path in folder.iterdir()}
    assert main(["fit", *arguments.split()]) == 2
    assert sentence in _one_sentence(capsys)
    assert fit.calls == []
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before


# Name of the test: the model, what the file "d" holds, and what the sentence must say.
DATA_MISTAKES: dict[str, tuple[str, str | bytes, str]] = {
    "malformed": ("m.py:model", '{"y": [1,\n2', "d is not JSON: Expecting ',' delimiter at line 2"),
    "empty": ("m.py:model", "", "d is not JSON: Expecting value at line 1, column 1"),
    "binary": ("m.py:model", b"\xff\xfe\x00", "d is not JSON"),
    "endless": ("m.py:model", '{"y": ' + "1" * 5000 + "}", "d is not JSON"),
    "bottomless": ("m.py:model", "[" * 200000, "d is not JSON"),
    "not an object": (
        "m.py:model",
        "[1, 2]",
        "JSON object, its keys the model's arguments; got a list",
    ),
    "incomplete": ("m.py:model", '{"y": [1.0]}', "d lacks 'sigma', which the model 'model' needs"),
    "unknown key": (
        "m.py:model",
        '{"y": 1, "sigma": 1, "sgima": 2}',
        "d holds 'sgima', but the model 'model' takes 'y', 'sigma' and 'power'",
    ),
    "no arguments": (
        "m.py:nothing",
        '{"y": 1}',
        "d holds 'y', but the model 'nothing' takes no arguments",
    ),
    "example incomplete": ("eight_schools", '{"y": [1]}', "d lacks 'sigma'"),
    "ragged": ("m.py:model", '{"y": [[1, 2], [3]], "sigma": 1}', "'y' in d is ragged"),
    "ragged depth": ("m.py:model", '{"y": [1, [2]], "sigma": 1}', "'y' in d is ragged"),
    "words": ("m.py:model", '{"y": [1, "a"], "sigma": 1}', "'y' in d to hold nothing but numbers"),
    "null inside": (
        "m.py:model",
        '{"y": [1, null], "sigma": 1}',
        "'y' in d to hold nothing but numbers",
    ),
    "object inside": (
        "m.py:model",
        '{"y": [{}], "sigma": 1}',
        "'y' in d to hold nothing but numbers",
    ),
    "too large": ("m.py:model", '{"y": [9223372036854775808], "sigma": 1}', "below 2**63"),
    "object": ("m.py:model", '{"y": {"a": 1}, "sigma": 1}', "'y' in d to be a number, a list"),
}


@pytest.mark.parametrize("mistake", list(DATA_MISTAKES))
def test_mistakes_in_the_data_are_told_before_the_fit(fit, folder, capsys, mistake):
    model, content, sentence = DATA_MISTAKES[mistake]
    (folder / "d").write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["fit", model, "--data", "d"]) == 2
    assert sentence in _one_sentence(capsys)
    assert fit.calls == []


def _one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    return _checked(err)


def _told(capsys: pytest.CaptureFixture[str]) -> str:
    return _checked(capsys.readouterr().err)


def _checked(err: str) -> str:
    assert err.startswith("pyroflows: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("arguments", [[], ["fti"], ["fit"], ["list", "more"], ["--sed"]])
def test_mistaken_commands_are_told(capsys, arguments):
    assert main(arguments) == 2
    assert "--help" in _one_sentence(capsys)


def test_files_that_were_there_survive_the_check(fit, folder):
    (folder / "f.nc").write_text("old")
    (folder / "f.png").mkdir()
    assert main(["fit", "funnel", "--out", "f.nc"]) == 2
    assert (folder / "f.nc").read_text() == "old"
    assert fit.calls == []


@pytest.mark.parametrize("spoilt", [".nc", ".png"])
def test_what_a_full_disk_refuses_is_saved_elsewhere(
    fit, folder, capsys, monkeypatch, tmp_path_factory, spoilt
):
    elsewhere = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    (folder / f"funnel{spoilt}").write_text("old")
    replace = os.replace

    def full(source: str, target: str) -> None:
        if str(target) == f"funnel{spoilt}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert main(["fit", "funnel"]) == 2
    out, err = capsys.readouterr()
    assert "ELBO" in out
    [saved] = elsewhere.glob(f"pyroflows-*/funnel{spoilt}")
    expected = f"Cannot write 'funnel{spoilt}': No space left on device. It is saved as {saved}"
    assert err == f"pyroflows: {expected} instead.\n"
    assert (folder / f"funnel{spoilt}").read_text() == "old"
    assert saved.stat().st_size > 1000


def test_a_full_machine_is_told(fit, capsys, monkeypatch):
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["fit", "funnel"]) == 2
    out, err = capsys.readouterr()
    assert "ELBO" in out
    assert err.count("\n") == 1
    assert "No space left on device. It could not be written to" in err


def test_a_posterior_that_arviz_cannot_show_is_kept(fit, folder, capsys):
    def to_arviz(draws: int) -> Any:
        raise RuntimeError("The model\ncannot predict.")

    fit.result.to_arviz = to_arviz
    assert main(["fit", "funnel"]) == 2
    assert "RuntimeError (The model cannot predict). It is saved as funnel.pt" in _told(capsys)
    assert (folder / "funnel.pt").read_text() == "posterior"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (BrokenPipeError(), 0, ""),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "Cannot write the output: No space"),
    ],
)
def test_an_output_that_nobody_reads(fit, folder, monkeypatch, capsys, error, code, told):
    def write(text: str) -> int:
        raise error

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=lambda: None))
    assert main(["fit", "funnel"]) == code
    assert told in capsys.readouterr().err
    assert (folder / "funnel.nc").exists()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("The site 'y' holds NaN."), "The site 'y' holds NaN."),
        (TypeError("Expected y to be\n   a tensor."), "Expected y to be a tensor."),
        (ValueError("It is so.\n Trace Shapes:\n  y  8"), "It is so."),
    ],
)
def test_what_the_fit_refuses_is_told(fit, capsys, error, sentence):
    fit.result = error
    assert main(["fit", "funnel"]) == 2
    assert capsys.readouterr().err == f"pyroflows: {sentence}\n"


def test_a_mistake_of_the_package_keeps_its_traceback(fit):
    fit.result = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["fit", "funnel"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("broken", "The model raised AttributeError ("),
        ("misshapen", "The model raised ValueError ("),
    ],
)
def test_a_model_that_raises_is_told_with_its_line(monkeypatch, capsys, name, sentence):
    def trace(model: Any, args: Any, kwargs: Any, **_: Any) -> None:
        poutine.trace(model).get_trace(*args, **kwargs)

    monkeypatch.setattr(pyroflows, "fit_posterior", trace)
    assert main(["fit", f"m.py:{name}", "--data", data(y=[1.0, 2.0])]) == 2
    err = capsys.readouterr().err
    line = 1 + next(
        i
        for i, text in enumerate(MODEL.splitlines())
        if text.endswith(
            "y.missing" if name == "broken" else "dist.Normal(torch.zeros(2), 1.0), obs=y)"
        )
    )
    assert sentence in err
    assert err.endswith(f" at m.py, line {line}.\n")
    assert err.count("\n") == 1


def test_an_error_that_a_sentence_tells_is_told_with_its_line(monkeypatch, capsys):
    def fit_posterior(model: Any, kwargs: Any, **_: Any) -> None:
        try:
            model(**kwargs)
        except AttributeError as error:
            raise ValueError("Expected a model that runs.") from error

    monkeypatch.setattr(pyroflows, "fit_posterior", fit_posterior)
    assert main(["fit", "m.py:broken", "--data", data(y=[1.0])]) == 2
    line = 1 + next(i for i, text in enumerate(MODEL.splitlines()) if text.endswith("y.missing"))
    expected = f"pyroflows: Expected a model that runs (m.py, line {line}).\n"
    assert capsys.readouterr().err == expected


def test_anything_that_a_model_raises_is_told(fit, monkeypatch, capsys):
    def end(*_: Any, **__: Any) -> None:
        raise GeneratorExit

    monkeypatch.setattr(pyroflows, "fit_posterior", end)
    assert main(["fit", "funnel"]) == 2
    assert "The model ended the program by GeneratorExit." in _one_sentence(capsys)


@pytest.mark.parametrize("name", ["exits", "stops"])
def test_a_model_that_ends_the_program_is_told(monkeypatch, capsys, name):
    monkeypatch.setattr(pyroflows, "fit_posterior", lambda model, **_: model())
    assert main(["fit", f"m.py:{name}"]) == (2 if name == "exits" else 130)
    expected = "The model raised SystemExit (3) at m.py" if name == "exits" else "Interrupted."
    assert expected in _one_sentence(capsys)


# The model, and the dtypes of its arguments x and k of whole numbers
NUMBERS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "counted": (torch.int64, torch.int64),
    "multiplied": (torch.float32, torch.int64),
    "both": (torch.float32, torch.float32),
    "hopeless": (torch.int64, torch.int64),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_whole_numbers_are_real_where_the_model_needs_it(fit, name):
    assert main(["fit", f"m.py:{name}", "--data", data(x=[[1, 2], [3, 4]], k=[0, 1])]) == 0
    kwargs = fit.calls[0][1]["kwargs"]
    assert (kwargs["x"].dtype, kwargs["k"].dtype) == NUMBERS[name]
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "broken",
            "got AttributeError ('Tensor' object has no attribute 'missing') after site 'z'",
        ),
        ("misshapen", "'n') at site y dim -1, 3 vs 2) at site 'y'"),
        ("model", "site 'y' observes shape (2, 1) under a distribution of batch shape (2,)"),
    ],
)
def test_a_model_that_cannot_be_fitted_is_told_with_its_site(capsys, name, sentence):
    given = {"y": [[1.0], [2.0]], "sigma": 1.0} if name == "model" else {"y": [1.0, 2.0]}
    assert main(["fit", f"m.py:{name}", "--data", data(**given)]) == 2
    told = _one_sentence(capsys)
    assert sentence in told
    assert ("(m.py, line " in told) == (name != "model")


def test_warnings_are_sentences(monkeypatch, capsys):
    def warn(*_: Any, **__: Any) -> FakePosterior:
        warnings.warn("The model is\nslow.", stacklevel=1)
        warnings.warn("Encountered NaN: log_prob_sum at site 'y'", stacklevel=1)
        return FakePosterior()

    monkeypatch.setattr(pyroflows, "fit_posterior", warn)
    assert main(["fit", "funnel", "--quiet"]) == 0
    assert capsys.readouterr().err == "pyroflows: The model is slow.\n"


def test_list_shows_the_examples(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == list(EXAMPLES)


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["list", "--help"]])
def test_help(capsys, arguments):
    assert main(arguments) == 0
    assert "usage: pyroflows" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyroflows {pyroflows.__version__}\n"


def _python(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    root = str(Path(pyroflows.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_a_mistake_in_a_process_of_its_own():
    run = _python("-m", "pyroflows", "fit", "nine_schools")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("pyroflows: There is no example")
    assert run.stderr.count("\n") == 1


def test_the_command_line_imports_nothing_heavy():
    heavy = "numpy", "torch", "pyro", "arviz", "matplotlib", "pyroflows.examples"
    code = f"""
import sys
from pyroflows.cli import main
main(["fit", "--help"])
sys.exit(not set(sys.modules).isdisjoint({heavy}))
"""
    assert _python("-c", code).returncode == 0


def test_an_interrupt_during_the_imports_is_told():
    code = """
import sys
from pyroflows.cli import main

class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
sys.exit(main(["fit", "eight_schools"]))
"""
    run = _python("-c", code)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "pyroflows: Interrupted.\n")


def test_end_to_end(folder):
    values = data(y=[2.0, 2.5, 3.0], sigma=0.5)
    options = f"--data {values} --time-limit 4 --draws 400 --out p.nc"
    run = _python("-m", "pyroflows", "fit", "m.py:model", *options.split())
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    row = next(line.split() for line in run.stdout.splitlines() if line.startswith("mu "))
    # The posterior is normal: precision 1 / 4 + 3 / 0.25, mean 2.5 * 12 / 12.25.
    assert float(row[1]) == pytest.approx(2.449, abs=0.06)
    assert float(row[2]) == pytest.approx(0.2857, abs=0.04)
    for word in ("ELBO", "log evidence", "k-hat", "importance ESS", "seconds"):
        assert word in run.stdout
    import xarray

    with xarray.open_dataset("p.nc", group="posterior") as posterior:
        assert posterior["mu"].size == 400
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
