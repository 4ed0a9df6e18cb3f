"""Members of one loop end, fail and resume as each would alone."""

import contextlib
import json
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.stages.kept import has_ended
from dpojax.training import pace
from dpojax.training.checkpoints import Checkpoints, load_params
from dpojax.training.loop import Every
from dpojax.training.metrics import Metric, MetricWriter, read_metrics
from dpojax.training.pace import Speed
from dpojax.training.preemption import Preempted, StopSignal
from dpojax.training.stop_at import STOP_AT, StopAt
from dpojax.training.vectorised_loop import (
    Member,
    MemberChunk,
    Orders,
    Resumed,
    VectorisedLoop,
    resume,
)
from dpojax.training.vectorised_step import MemberStates

STEPS = {"short": 4, "long": 6, "broken": 6}
CHUNKS = (("short", "long"), ("broken", None))  # a place without a member is idle
TOKENS = 50  # of a batch
EXAMPLES = [SimpleNamespace(id="file:1")]


class State(NamedTuple):
    step: jax.Array
    params: jax.Array


class Report(NamedTuple):
    metrics: dict
    finite: jax.Array
    bad: jax.Array


class Hyperparameters(NamedTuple):
    steps: jax.Array


class Batches:
    """1, 2, 3, ... with a position that is saved."""

    position = 0

    def __next__(self):
        self.position += 1
        example = np.zeros((1, 1, 1), int)
        segment = np.ones((1, 1, TOKENS), int)
        return SimpleNamespace(number=self.position, example=example, segment=segment)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def step(states, rows, hyperparameters):
    """Adds the batch's number to a member's params; at batch 3 a member of 6 steps may break."""
    (done, params), alive = states
    steps = hyperparameters.steps
    finite = ~((steps < 0) & (rows.number == 3))
    active = alive & (done < jnp.abs(steps))
    taken = active & finite
    new = State(done + taken, params + jnp.where(taken, rows.number, 0.0))
    loss = Metric(jnp.where(active, 10.0 * rows.number, 0.0), jnp.where(active, 1.0, 0.0))
    report = Report({"loss": loss}, finite | ~active, ~finite[:, None, None, None])
    return MemberStates(new, alive & report.finite), report


def new_states():
    return MemberStates(State(jnp.zeros(2, int), jnp.zeros(2)), jnp.ones(2, bool))


@pytest.fixture
def train(monkeypatch):
    """(folder, the step to stop after) -> the members, trained from where they are.

    The long one may be told to stop once its params are so large.
    """

    def run(folder, stop_after=None, long_stops_at=None):
        monkeypatch.setattr(pace, "utilisation", lambda rows: 1.0)
        monkeypatch.setattr(StopSignal, "agreed", lambda self, done=0: done == stop_after)
        with contextlib.ExitStack() as stack:
            saved = stack.enter_context(Checkpoints(folder / "together"))
            batches = Orders([Batches()])
            abstract = jax.eval_shape(new_states)
            resumed = resume(saved, abstract, len(CHUNKS), batches)
            states, done, failed, tallies, stops = resumed or Resumed(
                [new_states()] * 2, 0, {}, {}, {}
            )

            def member(name):
                own = stack.enter_context(Checkpoints(folder / name))
                writer = stack.enter_context(MetricWriter(folder / name, resume_step=done))
                evaluate = lambda state: {"params": float(state.params)}
                error = failed.get(name, "")
                new = Member(name, STEPS[name], evaluate, writer, own, error=error)
                new.tally.restore(tallies.get(name))
                if name == "long" and long_stops_at is not None:
                    new.stop_at = StopAt("params", 1, long_stops_at)
                    new.stop_at.restore({STOP_AT: stops.get(name)})
                    new.ended = has_ended(own, new.steps)
                return new

            chunks = [
                MemberChunk(
                    [member(name) for name in names if name],
                    of_chunk,
                    Hyperparameters(jnp.array(steps)),
                )
                for names, of_chunk, steps in zip(CHUNKS, states, ([4, 6], [-6, 0]))
            ]
            loop = VectorisedLoop(
                stage="toy",
                step=step,
                take_member=lambda states, i: jax.tree.map(lambda x: x[i], states.states),
                batches=batches,
                place=lambda batch: [batch[0]] * 2,
                rows_of=lambda batch, chunk, index: batch[0],
                every=Every(log=2, evaluate=3, checkpoint=0),
                examples=EXAMPLES,
                checkpoints=saved,
                stop=StopSignal(),
                speed=Speed(lambda rows: 1e12, lambda: 4e12, devices=2, peak=8e12),
            )
            loop(chunks, done)
            return [member for chunk in chunks for member in chunk.members]

    return run


def metrics(folder, split):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: line["loss" if split == "train" else "params"]
        for line in lines
        if line["split"] == split
    }


def tokens(folder):
    return {line["step"]: line["num_tokens"] for line in read_metrics(folder, "train")}


def final(folder, step):
    return float(load_params(folder, jax.ShapeDtypeStruct((), jnp.float32), step))


def test_members_end_and_fail_alone(train, tmp_path):
    short, long, broken = train(tmp_path)
    assert not short.error
    assert not long.error
    assert broken.error == "loss or gradient is not finite at step 3: file:1"
    assert final(tmp_path / "short", 4) == 1 + 2 + 3 + 4
    assert final(tmp_path / "long", 6) == 1 + 2 + 3 + 4 + 5 + 6
    assert not list((tmp_path / "broken").glob("[0-9]*"))
    assert metrics(tmp_path / "short", "train") == {2: 15.0, 4: 35.0}
    assert metrics(tmp_path / "long", "train") == {2: 15.0, 4: 35.0, 6: 55.0}
    assert metrics(tmp_path / "broken", "train") == {2: 15.0}
    assert tokens(tmp_path / "short") == {2: 2 * TOKENS, 4: 4 * TOKENS}
    assert tokens(tmp_path / "long") == {step: step * TOKENS for step in (2, 4, 6)}
    assert metrics(tmp_path / "short", "eval") == {0: 0.0, 3: 6.0, 4: 10.0}
    assert metrics(tmp_path / "long", "eval") == {0: 0.0, 3: 6.0, 6: 21.0}


def test_the_speed_is_that_of_the_members_that_take_a_step_together(train, tmp_path):
    """50 tokens and 1e12 FLOPs each; the broken one takes 2 steps, the short one 4."""
    train(tmp_path)
    lines = read_metrics(tmp_path / "long", "train")
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line, members in zip(lines, (3, 2, 1)):
        seconds = line["perf/seconds_per_step"]
        assert line["perf/tokens_per_second"] * seconds == pytest.approx(50 * members)
        assert line["perf/examples_per_second"] * seconds == pytest.approx(members)
        assert line["perf/tflops_per_device"] * seconds == pytest.approx(members / 2)
        assert line["perf/mfu"] * seconds == pytest.approx(members / 8)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_with_what_had_ended_and_failed(train, tmp_path):
    train(tmp_path / "whole")
    for stop_after in (1, 3, 5):
        folder = tmp_path / f"stopped{stop_after}"
        with pytest.raises(Preempted, match=f"toy: stopped at step {stop_after} of 6, saved"):
            train(folder, stop_after)
        members = train(folder)
        assert [bool(member.error) for member in members] == [False, False, True]
        assert final(folder / "long", 6) == 21
        assert final(folder / "short", 4) == 10
        for split in ("train", "eval"):
            whole = metrics(tmp_path / "whole" / "long", split)
            assert metrics(folder / "long", split) == whole
        assert tokens(folder / "long") == {step: step * TOKENS for step in (2, 4, 6)}


@pytest.mark.slow
def test_a_member_that_stops_at_a_value_takes_no_more_steps_and_the_others_go_on(train, tmp_path):
    """Also where the sweep is stopped before, when or after it does."""
    for stop_after in (None, 1, 3):
        folder = tmp_path / f"stopped{stop_after}"
        if stop_after is not None:
            with pytest.raises(Preempted, match=f"toy: stopped at step {stop_after} of 6, saved"):
                train(folder, stop_after, long_stops_at=5.0)
        members = train(folder, long_stops_at=5.0)
        assert [bool(member.error) for member in members] == [False, False, True]
        assert final(folder / "long", 3) == 1 + 2 + 3
        assert {path.name for path in (folder / "long").glob("[0-9]*")} == {"3"}
        assert metrics(folder / "long", "eval") == {0: 0.0, 3: 6.0}
        assert metrics(folder / "long", "train") == {2: 15.0, 3: 30.0}  # of all its steps
        assert final(folder / "short", 4) == 10


def test_a_sweep_in_which_all_have_stopped_is_finished_though_it_is_asked_to_stop(train, tmp_path):
    short, long, broken = train(tmp_path, stop_after=4, long_stops_at=5.0)
    assert (short.error, long.error) == ("", "")
    assert broken.error
    assert not (tmp_path / "together").exists() or not [*(tmp_path / "together").glob("[0-9]*")]
