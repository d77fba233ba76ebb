"""Timing, memory and errors: of methods whose time, memory and error are known."""

import importlib.util
import time

import pytest
import torch

from calsmooth.bench import config, measure, memory, methods
from calsmooth.bench.inputs import random_inputs
from calsmooth.bench.methods import METHODS, Contestant, Method, line_up, power_of_two
from calsmooth.bench.shapes import Shape
from calsmooth.loss.functional import DEFAULT_FILTER_EPS
from calsmooth.loss.functional import MODES as LOSS_MODES

CPU = torch.device("cpu")
MB = 2**20


@pytest.fixture
def inputs():
    return random_inputs(Shape("", 700, 24), 40, "model-like", dtype=torch.float32, device=CPU, seed=1)


def method(name="one", mode="", smooths=True, why_not=None, build=None, **kwargs):
    eager = next(m for m in METHODS if m.name == "eager")
    return Method(name, mode, smooths, lambda inputs: why_not, build or eager.build, **kwargs)


def measured(inputs, *those, beta=0.1, repeats=2, seconds=60, frozen="none", tokens=None):
    contestants = [Contestant(m, beta) for m in those]
    return measure.measure(
        inputs,
        contestants,
        repeats=repeats,
        seconds=seconds,
        frozen=frozen,
        reference_tokens=tokens or len(inputs.targets),
        advance=lambda *a, **k: None,
    )


linux_only = pytest.mark.skipif(
    not memory._reset_resident_peak(), reason="this system can't reset a process's peak memory"
)


@linux_only
def test_peak_memory_sees_what_was_freed_before_it_is_read():
    peak = memory.PeakMemory(CPU)
    peak.start()
    x = torch.ones(64 * MB // 4)
    del x
    assert 60 * MB < peak.read() < 80 * MB
    peak.start()
    assert peak.read() < 8 * MB


@linux_only
def test_peaks_are_of_forward_and_of_both(inputs):
    def build(beta, softcap):
        def loss(E, C, y):
            extra = torch.ones(48 * MB // 4)
            return (E @ C.T).mean() + extra[0] * 0

        return loss

    (m,) = measured(inputs, method(build=build))
    assert 44 * MB < m.peak(lambda s: s.forward_peak_bytes) < 64 * MB
    assert m.peak(lambda s: s.peak_bytes) >= m.peak(lambda s: s.forward_peak_bytes)
    assert m.no_grad_peak_bytes > 44 * MB


def test_time_is_split_between_forward_and_backward(inputs):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.02)
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            time.sleep(0.06)
            return torch.ones(40, 24) * g

    def build(beta, softcap):
        return lambda E, C, y: Slow.apply(E) + 0 * C.sum()

    (m,) = measured(inputs, method(build=build), repeats=3)
    assert len(m.samples) == 3
    # Lower bounds only: a busy machine may take longer, never shorter.
    assert m.median(lambda s: s.forward_ms) >= 20
    assert m.median(lambda s: s.backward_ms) >= 60
    assert m.spread(lambda s: s.forward_ms) >= 0
    assert min(m.no_grad_ms) >= 20


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_every_method_here_has_the_definitions_gradients(beta, softcap):
    inputs = random_inputs(Shape("", 700, 24, softcap), 40, "model-like", dtype=torch.float32, device=CPU, seed=1)
    names = ("calsmooth", "eager", "chunked", "F.linear_cross_entropy")
    contestants, _ = line_up(inputs, (beta,), names, ("exact", "lean"))
    results = measure.measure(
        inputs, contestants, repeats=1, seconds=60, frozen="none", reference_tokens=40, advance=lambda *a, **k: None
    )
    assert {m.contestant.method.name for m in results} >= {"calsmooth", "eager", "chunked"}
    for m in results:
        assert m.error is None
        assert m.loss_error < 1e-5
        assert m.grad_error_hidden < 1e-4
        assert m.grad_error_head < 1e-4


def test_a_wrong_gradient_is_seen_as_large_as_it_is(inputs):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return 1.25 * g

    eager = next(m for m in METHODS if m.name == "eager")

    def build(beta, softcap):
        return lambda E, C, y: eager.build(beta, softcap)(Scaled.apply(E), C, y)

    (m,) = measured(inputs, method(build=build))
    assert m.grad_error_hidden == pytest.approx(0.25, rel=1e-4)
    assert m.grad_error_head < 1e-5


def test_a_reference_over_few_tokens_ignores_the_others(inputs):
    (m,) = measured(inputs, method(), tokens=7)
    assert m.grad_error_hidden < 1e-5
    assert m.loss_error < 1e-6


@pytest.mark.parametrize(("frozen", "missing"), [("head", "grad_error_head"), ("body", "grad_error_hidden")])
def test_what_is_frozen_gets_no_gradient(inputs, frozen, missing):
    (m,) = measured(inputs, next(m for m in METHODS if m.name == "calsmooth"), frozen=frozen)
    present = {"grad_error_head", "grad_error_hidden"} - {missing}
    assert getattr(m, missing) is None
    assert getattr(m, present.pop()) < 1e-5


def test_methods_take_turns(inputs):
    order = []

    def recorder(name):
        def build(beta, softcap):
            def loss(E, C, y):
                order.append((name, torch.is_grad_enabled()))
                return (E @ C.T).mean()

            return loss

        return method(name, build=build)

    measured(inputs, recorder("a"), recorder("b"), repeats=8)
    # First the comparison, then a warm-up under no_grad, then rounds of loss with gradients and loss alone.
    for graded in (True, False):
        names = [name for name, grad in order if grad == graded]
        rounds = [tuple(names[i : i + 2]) for i in range(0, len(names), 2)]
        assert rounds[0] == ("a", "b")
        assert len(rounds) == 9
        assert set(rounds[1:]) == {("a", "b"), ("b", "a")}  # nobody always follows the same one


def test_no_new_round_begins_once_the_time_is_over(inputs):
    (m,) = measured(inputs, method(), repeats=50, seconds=0)
    assert len(m.samples) == 1


def test_a_method_that_fails_is_told_and_the_others_go_on(inputs):
    def failing(beta, softcap):
        def loss(E, C, y):
            raise ValueError("no\nsuch   shape")

        return loss

    def out_of_memory(beta, softcap):
        return lambda E, C, y: torch.empty(2**50)

    bad, huge, good = measured(inputs, method("bad", build=failing), method("huge", build=out_of_memory), method())
    assert bad.error == "ValueError: no such shape"
    assert bad.samples == []
    assert huge.error == "out of memory"
    assert good.error is None
    assert len(good.samples) == 2


def test_gradients_that_are_not_finite_have_no_error(inputs):
    def build(beta, softcap):
        return lambda E, C, y: (E @ C.T).mean() * float("nan")

    (m,) = measured(inputs, method(build=build))
    assert m.loss_error is m.grad_error_head is m.grad_error_hidden is None
    assert "not finite" in m.note


def test_what_would_not_fit_a_cpus_memory_never_starts(inputs, monkeypatch):
    started = []

    def build(beta, softcap):
        started.append(1)
        return lambda E, C, y: (E @ C.T).mean()

    monkeypatch.setattr(memory, "available", lambda device: 2**30)
    big, small = measured(inputs, method(build=build, bytes_per_logit=100_000), method())
    assert big.error.startswith("needs about 2.6 GiB, 1.0 GiB are free")
    assert not started
    assert small.error is None


def test_no_room_for_float64_leaves_the_times(inputs, monkeypatch):
    monkeypatch.setattr(measure, "_reference_fits", lambda inputs: False)
    (m,) = measured(inputs, method())
    assert m.grad_error_head is None
    assert "float64" in m.note
    assert len(m.samples) == 2


def test_a_method_that_cannot_smooth_runs_once_without(inputs, monkeypatch):
    monkeypatch.setattr(methods, "METHODS", (method("plain", smooths=False), method("smooth")))
    contestants, absent = line_up(inputs, (0.0, 0.1))
    assert [(c.method.name, c.beta) for c in contestants] == [("plain", 0.0), ("smooth", 0.0), ("smooth", 0.1)]
    assert absent == {}


def test_absent_methods_say_why(inputs):
    contestants, absent = line_up(inputs, (0.1,))
    here = {c.method.name for c in contestants}
    assert {"calsmooth", "eager", "chunked"} <= here
    assert {"liger-kernel", "quack-kernels", "fla-core"} <= set(absent)
    assert ("trl" in absent) == (importlib.util.find_spec("trl") is None)
    assert all("not installed" in absent[name] or "GPU" in absent[name] for name in ("liger-kernel", "fla-core"))


def test_modes_that_are_named_are_measured_everywhere(inputs):
    contestants, _ = line_up(inputs, (0.1,), ("calsmooth",), ("exact", "filtered"), (2.0**-12, 2.0**-16))
    labels = [c.label for c in contestants]
    assert labels == ["calsmooth exact", "calsmooth filtered", "calsmooth filtered 2^-16"]
    results = measure.measure(
        inputs, contestants, repeats=1, seconds=60, frozen="none", reference_tokens=40, advance=lambda *a, **k: None
    )
    exact, filtered, finer = results
    assert exact.kept_mass is None
    assert 0.5 < filtered.kept_mass < finer.kept_mass <= 1
    assert exact.grad_error_head < finer.grad_error_head < filtered.grad_error_head


def test_the_configuration_names_what_there_is():
    assert {m.name for m in METHODS} == set(config.METHOD_NAMES)
    assert set(config.MODES) == set(LOSS_MODES)
    assert config.DEFAULT_FILTER_EPS == DEFAULT_FILTER_EPS


def test_powers_of_two():
    assert power_of_two(2.0**-12) == "2^-12"
    assert power_of_two(1e-4) == "0.0001"


def test_the_matmul_rate_is_a_rate():
    assert 1e8 < measure.matmul_rate(CPU, torch.float32) < 1e14


def test_relative_error_of_many_rows():
    exact = torch.randn(20_000, 3, dtype=torch.float64)
    assert measure.relative_error(exact * 1.5, exact) == pytest.approx(0.5)
