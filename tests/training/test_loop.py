"""The loop keeps the state of the best evaluation, whatever stops it, bit for bit."""

import contextlib
import itertools
import signal
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import stopping
from dpojax.training.checkpoints import Checkpoints, best, load_params
from dpojax.training.keep_best import KeepBest
from dpojax.training.loop import Every, TrainLoop
from dpojax.training.metrics import MetricWriter, read_metrics
from dpojax.training.pace import Speed
from dpojax.training.preemption import Preempted, StopSignal
from dpojax.training.stop_at import StopAt

ACCURACIES = {0: 0.99, 2: 0.6, 4: 0.9, 6: 0.7, 8: 0.9, 10: 0.8, 11: float("nan")}
SHAPE = jax.ShapeDtypeStruct((3,), jnp.float32)


class State(NamedTuple):
    step: jax.Array
    params: jax.Array


class Killed(BaseException):
    pass


class Batches:
    """Endless, with a position that is saved."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return SimpleNamespace(segment=np.ones(1, int), example=np.zeros(1, int))

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class Report(NamedTuple):
    metrics: dict
    finite: bool = True


def step(state, rows, hyper):
    return State(state.step + 1, state.params * 1.1 + state.step), Report({})


@pytest.fixture
def run_loop(monkeypatch):
    """(folder, the step at whose evaluation it is killed) -> runs it, from where it is."""
    monkeypatch.setattr("dpojax.training.pace.utilisation", lambda rows: 1.0)

    def start(
        folder,
        killed_at=None,
        *,
        sign=1,
        patience=0,
        values=ACCURACIES,
        asked_at=None,
        keep=True,
        stop_at=None,
    ):
        def evaluate(state):
            if int(state.step) == killed_at:
                raise Killed
            if int(state.step) == asked_at:
                signal.raise_signal(signal.SIGTERM)
            stopping.between_batches()
            return {"accuracy": values[int(state.step)]}

        with contextlib.ExitStack() as stack:
            saved = stack.enter_context(Checkpoints(folder / "checkpoints", max_checkpoints=1))
            writer = stack.enter_context(MetricWriter(folder))
            state, batches = State(jnp.int32(0), jnp.arange(3.0)), Batches()
            if saved.latest is not None:
                abstract = State(jax.ShapeDtypeStruct((), jnp.int32), SHAPE)
                state, _ = saved.restore(abstract, batches)
            run = TrainLoop(
                stage="toy",
                step=step,
                batches=batches,
                to_device=lambda rows: rows,
                evaluate=evaluate,
                speed=Speed(lambda rows: 0.0, lambda: 1.0),
                hyper={},
                steps=11,
                every=Every(log=0, evaluate=2, checkpoint=5),
                examples=[],
                checkpoints=saved,
                writer=writer,
                stop=stack.enter_context(StopSignal()),
                keep_best=KeepBest("accuracy", sign, patience) if keep else None,
                stop_at=stop_at and StopAt("accuracy", sign, stop_at),
            )
            return run(state)

    return start


@pytest.fixture
def run_to_a_signal(run_loop):
    """(folder, the step whose evaluation gets a signal, or None) -> runs it, keeping no best."""
    stopping.forget()
    yield lambda folder, at, keep=False: run_loop(folder, asked_at=at, keep=keep)
    stopping.forget()


def metrics_of(folder):
    """As text, in which nan equals nan, and without what differs from machine to machine."""
    lines = [line | {"time": 0.0} for line in read_metrics(folder)]
    machine = ("perf/", "memory/")
    return str([{k: x for k, x in line.items() if not k.startswith(machine)} for line in lines])


def steps_of(checkpoints):
    return {path.name for path in checkpoints.iterdir()} if checkpoints.exists() else set()


@pytest.fixture
def killed_after_an_evaluation(monkeypatch):
    """(step) -> the next run is killed when the evaluation after that step is logged, unsaved."""

    def kill(step):
        save = TrainLoop._save

        def killed(self, state, at, *rest):
            if at == step:
                raise Killed
            save(self, state, at, *rest)

        monkeypatch.setattr(TrainLoop, "_save", killed)
        return lambda: monkeypatch.setattr(TrainLoop, "_save", save)

    return kill


def test_the_first_of_the_best_evaluations_is_kept_beside_the_newest(run_loop, tmp_path):
    run_loop(tmp_path)
    assert best(tmp_path / "checkpoints") == (0.9, 4)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "11"}
    params = np.arange(3, dtype=np.float32)
    for number in range(4):
        params = params * np.float32(1.1) + np.float32(number)
    found = load_params(tmp_path / "checkpoints", SHAPE, 4)
    np.testing.assert_allclose(found, params, rtol=1e-6)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_keeps_the_same_best(run_loop, tmp_path):
    whole = run_loop(tmp_path / "whole")
    kept = load_params(tmp_path / "whole" / "checkpoints", SHAPE, 4)
    for killed_at in itertools.islice(ACCURACIES, 1, None):
        folder = tmp_path / f"killed{killed_at}"
        with pytest.raises(Killed):
            run_loop(folder, killed_at)
        again = run_loop(folder)
        assert best(folder / "checkpoints") == (0.9, 4)
        np.testing.assert_array_equal(load_params(folder / "checkpoints", SHAPE, 4), kept)
        np.testing.assert_array_equal(again.params, whole.params)


# Losses whose lowest is at step 4; without patience, a lower one comes at step 10.
LOSSES = {0: 0.1, 2: 0.6, 4: 0.3, 6: 0.3, 8: float("nan"), 10: 0.2, 11: 0.9}


def test_without_a_better_evaluation_for_so_long_training_stops_and_the_best_is_kept(
    run_loop, tmp_path
):
    """Of the equal losses at steps 4 and 6 the first counts; NaN is no better one."""
    final = run_loop(tmp_path, sign=-1, patience=2, values=LOSSES)
    assert int(final.step) == 8
    assert best(tmp_path / "checkpoints") == (-0.3, 4)
    with Checkpoints(tmp_path / "checkpoints") as saved:
        assert saved.latest == 8
        kept = saved.metadata()["keep best"]
    assert kept == {"score": -0.3, "step": 4, "waited": 2, "at_start": 0.1, "stopped_at": 8}


def test_a_lower_loss_after_the_wait_is_kept_where_patience_is_longer(run_loop, tmp_path):
    assert int(run_loop(tmp_path, sign=-1, patience=3, values=LOSSES).step) == 11
    assert best(tmp_path / "checkpoints") == (-0.2, 10)


@pytest.mark.slow
def test_a_run_killed_before_or_after_any_evaluation_stops_at_the_same_step(
    run_loop, killed_after_an_evaluation, tmp_path
):
    """Its checkpoints of steps 4 (the best), 5 and 8 (the stop) are where it can go on from."""
    settings = {"sign": -1, "patience": 2, "values": LOSSES}
    whole = run_loop(tmp_path / "whole", **settings)
    for step in (2, 4, 6, 8):
        before = tmp_path / f"before{step}"
        with pytest.raises(Killed):
            run_loop(before, step, **settings)
        after = tmp_path / f"after{step}"
        alive = killed_after_an_evaluation(step)
        with contextlib.suppress(Killed):  # nothing is saved at step 6
            run_loop(after, **settings)
        alive()
        for folder in (before, after):
            again = run_loop(folder, **settings)
            assert int(again.step) == 8
            np.testing.assert_array_equal(again.params, whole.params)
            assert best(folder / "checkpoints") == (-0.3, 4)


def test_a_run_killed_around_an_evaluation_stops_where_the_value_is_first_reached(
    run_loop, killed_after_an_evaluation, tmp_path
):
    """At step 6; the evaluation before the first step has reached it already, and stops nothing."""
    settings = {"values": ACCURACIES | {4: 0.65, 6: 0.7, 8: 0.9}, "stop_at": 0.7, "keep": False}
    whole = run_loop(tmp_path / "whole", **settings)
    assert int(whole.step) == 6
    for step in (4, 6):
        before, after = tmp_path / f"before{step}", tmp_path / f"after{step}"
        with pytest.raises(Killed):
            run_loop(before, step, **settings)
        alive = killed_after_an_evaluation(step)
        with contextlib.suppress(Killed):  # nothing is saved at step 4
            run_loop(after, **settings)
        alive()
        for folder in (before, after):
            again = run_loop(folder, **settings)
            np.testing.assert_array_equal(again.params, whole.params)
            with Checkpoints(folder / "checkpoints") as saved:
                assert saved.latest == 6
                assert saved.metadata()["stop at"]["stopped_at"] == 6


def test_the_matmul_ceiling_is_asked_when_a_speed_is_logged_and_not_before():
    asked = []
    speed = Speed(lambda rows: 6.0, lambda: asked.append(True) or 2.0)
    assert "perf/model_flops_utilisation" not in speed.flush()
    assert not asked
    speed.flops, speed.steps, speed.fill = 6.0, 1, [1.0]
    assert speed.flush()["perf/model_flops_utilisation"] > 0
    assert asked


@pytest.mark.parametrize("asked_at", [0, 4, 10])
def test_a_signal_ends_an_evaluation_which_is_repeated_first(tmp_path, run_to_a_signal, asked_at):
    whole = run_to_a_signal(tmp_path / "whole", None)
    folder = tmp_path / "stopped"
    for _ in range(2):  # also where it comes again while the evaluation is repeated
        with pytest.raises(Preempted, match=f"in the evaluation at step {asked_at} of 11"):
            run_to_a_signal(folder, asked_at)
        assert steps_of(folder / "checkpoints") == {str(asked_at)} - {"0"}
    again = run_to_a_signal(folder, None)
    np.testing.assert_array_equal(again.params, whole.params)
    assert metrics_of(folder) == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize("keep", [True, False], ids=["keeps the best", "last step"])
def test_an_evaluation_that_decides_is_not_cut_short(tmp_path, run_to_a_signal, keep):
    at = 4 if keep else 11
    with pytest.raises(Preempted, match="stopped at step 5 of 11" if keep else "after the"):
        run_to_a_signal(tmp_path, at, keep=keep)
    assert steps_of(tmp_path / "checkpoints") == ({"4", "5"} if keep else {"11"})
    evaluated = [line["step"] for line in read_metrics(tmp_path) if line["split"] == "eval"]
    assert evaluated[-1] == at
