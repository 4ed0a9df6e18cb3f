"""A train line covers all steps since the last one, also where the run was stopped between them."""

import contextlib
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.training.checkpoints import Checkpoints
from dpojax.training.loop import Every, TrainLoop
from dpojax.training.metrics import Metric, MetricWriter, Window, read_metrics
from dpojax.training.pace import Speed
from dpojax.training.preemption import Preempted, StopSignal


class State(NamedTuple):
    step: jax.Array


class Batches:
    """The n-th batch has n tokens."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return SimpleNamespace(segment=np.ones(self.position, int), example=np.zeros(1, int))

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def step(state, rows, hyper):
    """The loss of step n is 1 / n, with weight n."""
    number = state.step + 1
    loss = Metric(jnp.float32(1), number.astype(jnp.float32))
    return State(number), SimpleNamespace(metrics={"loss": loss}, finite=True)


@pytest.fixture
def train(monkeypatch):
    """(folder, the step to stop after) -> the train lines, by step."""
    monkeypatch.setattr("dpojax.training.pace.utilisation", lambda rows: 1.0)

    def run(folder, stop_after=None):
        monkeypatch.setattr(StopSignal, "agreed", lambda self, done=0: done == stop_after)
        with contextlib.ExitStack() as stack:
            saved = stack.enter_context(Checkpoints(folder / "checkpoints"))
            state, batches, done = State(jnp.int32(0)), Batches(), saved.latest
            if done is not None:
                state, _ = saved.restore(jax.eval_shape(lambda: state), batches)
            writer = MetricWriter(folder, resume_step=done)
            TrainLoop(
                stage="toy",
                step=step,
                batches=batches,
                to_device=lambda rows: rows,
                evaluate=lambda state: {},
                speed=Speed(lambda rows: 1.0, lambda: 1.0),
                hyper={},
                steps=11,
                every=Every(log=4, evaluate=3, checkpoint=0),
                examples=[],
                checkpoints=saved,
                writer=stack.enter_context(writer),
                stop=StopSignal(),
            )(state)

    return run


@pytest.mark.slow
def test_stopping_between_two_lines_changes_neither(train, tmp_path):
    tokens = {4: sum(range(5)), 8: sum(range(9)), 11: sum(range(12))}  # since step 0, as TRL's
    loss = {4: 4 / 10, 8: 4 / 26, 11: 3 / 30}
    for stop_after in (None, 1, 3, 4, 6, 10):
        folder = tmp_path / str(stop_after)
        if stop_after is not None:
            with pytest.raises(Preempted):
                train(folder, stop_after)
        train(folder)
        lines = read_metrics(folder, "train")
        assert {line["step"]: line["num_tokens"] for line in lines} == tokens
        assert {line["step"]: line["loss"] for line in lines} == loss


def test_a_window_goes_on_from_its_state_and_starts_anew_after_a_flush():
    first, second = Window(), Window()
    first.add({"loss": Metric(3.0, 1.0)})
    second.restore(first.state())
    second.add({"loss": Metric(5.0, 3.0), "other": Metric(1.0, 2.0)})
    assert second.flush() == {"loss": 8 / 4, "other": 1 / 2}
    assert second.state() == {}
    assert first.flush() == {"loss": 3.0}
