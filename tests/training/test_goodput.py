"""The buckets of a run's time add up to its wall time; what restarts repeat counts as lost."""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.training import goodput
from dpojax.training.goodput import (
    BUCKETS,
    CHECKPOINT,
    COMPILE,
    DATA,
    DOWN,
    EVALUATION,
    GOES_ON,
    LOST,
    SAVED,
    START,
    STARTED,
    STEP,
    Stopwatch,
    describe,
    read,
    share,
    shortened,
    split,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Process:
    """The records of a process, whose seconds a test sets."""

    def __init__(self, began: float):
        self.began, self.seconds = began, dict.fromkeys(BUCKETS, 0.0)
        self.records = [self._record(STARTED)]

    def spend(self, **seconds: float) -> "Process":
        for bucket, x in seconds.items():
            self.seconds[bucket] += x
        self.records.append(self._record("beat"))
        return self

    def saves(self, stage: str, step: int) -> "Process":
        self.records.append(self._record(SAVED, stage=stage, step=step))
        return self

    def goes_on(self, stage: str, step: int) -> "Process":
        self.records.append(self._record(GOES_ON, stage=stage, step=step))
        return self

    @property
    def ended(self) -> float:
        return self.began + sum(self.seconds.values())

    def _record(self, event, **more):
        return {"event": event, "time": self.ended, "seconds": dict(self.seconds)} | more


def of(*processes: Process) -> dict[str, float]:
    """The split, of which it is checked that it is one of the wall time."""
    totals = split([record for process in processes for record in process.records])
    wall = processes[-1].ended - processes[0].began
    assert sum(totals.values()) == pytest.approx(wall)
    assert min(totals.values()) >= 0
    return {name: x for name, x in totals.items() if x}


def test_the_steps_after_the_save_that_a_killed_run_goes_on_from_are_lost():
    killed = Process(1000.0).goes_on("sft", 0).spend(start=5, compile=7, step=10).saves("sft", 10)
    killed.spend(step=3, data=1, evaluation=2, checkpoint=0.5)
    resumed = Process(killed.ended + 60).spend(start=4).goes_on("sft", 10).spend(step=20)
    assert of(killed, resumed) == {
        START: 9,
        COMPILE: 7,
        STEP: 30,
        CHECKPOINT: 0.5,
        LOST: 6,  # 3 of steps, 1 of data and 2 of an evaluation, which are all done again
        DOWN: 60,
    }


def test_a_run_that_saved_when_it_was_stopped_has_lost_nothing():
    stopped = Process(0.0).goes_on("sft", 0).spend(step=10).saves("sft", 4).spend(checkpoint=1)
    resumed = Process(stopped.ended).goes_on("sft", 4).spend(step=5)
    assert of(stopped, resumed) == {STEP: 15, CHECKPOINT: 1}


def test_a_run_that_was_killed_before_its_first_save_has_lost_all_its_steps():
    killed = Process(0.0).spend(start=3).goes_on("sft", 0).spend(compile=4, step=8)
    in_data = Process(killed.ended + 1).spend(start=2)  # comes to no step at all
    again = Process(in_data.ended).goes_on("sft", 0).spend(step=9)
    assert of(killed, in_data, again) == {START: 5, COMPILE: 4, STEP: 9, LOST: 8, DOWN: 1}


def test_what_several_starts_from_one_checkpoint_did_is_lost_but_the_last():
    first = Process(0.0).goes_on("sft", 0).spend(step=10).saves("sft", 5).spend(step=1)
    second = Process(first.ended).goes_on("sft", 5).spend(step=2)
    third = Process(second.ended).goes_on("sft", 5).spend(step=4)
    assert of(first, second, third) == {STEP: 14, LOST: 3}


def test_a_checkpoint_that_was_never_whole_on_disk_counts_as_none():
    """The process went on from step 5, though one was begun at 10."""
    killed = Process(0.0).goes_on("sft", 0).spend(step=10).saves("sft", 5)
    killed.spend(step=10).saves("sft", 10)
    assert of(killed, Process(20.0).goes_on("sft", 5).spend(step=15)) == {STEP: 25, LOST: 10}


def test_a_stage_that_is_done_is_not_lost_with_the_next_one():
    killed = Process(0.0).goes_on("sft", 0).spend(step=10).saves("sft", 5)
    killed.goes_on("preference", 0).spend(step=7)
    resumed = Process(17.0).goes_on("preference", 0).spend(step=8)
    assert of(killed, resumed) == {STEP: 18, LOST: 7}
    killed_between = Process(0.0).goes_on("sft", 0).spend(step=10).saves("sft", 5)
    assert of(killed_between, Process(10.0).goes_on("preference", 0).spend(step=8)) == {STEP: 18}
    earlier = Process(0.0).goes_on("sft", 0).spend(step=10).saves("sft", 5).spend(step=1)
    both = Process(11.0).goes_on("sft", 5).spend(step=2).saves("sft", 6)
    both.goes_on("preference", 0).spend(step=3)
    assert of(earlier, both) == {STEP: 15, LOST: 1}


@pytest.mark.parametrize("seed", range(20))
def test_any_history_is_split_without_a_rest(seed):
    draw = np.random.default_rng(seed)
    processes, step, now = [], 0, 0.0
    for _ in range(draw.integers(1, 6)):
        process = Process(now).spend(start=draw.random()).goes_on("sft", step)
        for _ in range(draw.integers(0, 6)):
            spent = {name: draw.random() for name in (STEP, DATA, EVALUATION, COMPILE)}
            process.spend(**spent)
            if draw.random() < 0.5:
                step += int(draw.integers(1, 4))
                process.saves("sft", step)
        processes.append(process)
        now = process.ended + draw.random()
        step = max(0, step - int(draw.integers(0, 3)))  # the last checkpoint may be damaged
    of(*processes)
    records = [record for process in processes for record in process.records]
    assert split(shortened(records)) == split(records)


def test_one_bucket_counts_at_a_time_and_blocks_give_back_to_the_one_around():
    clock = Clock()
    watch = Stopwatch(age=2.0, clock=clock)
    for bucket, seconds in [(STEP, 1), (DATA, 2), (STEP, 4), (EVALUATION, 8), (STEP, 16)]:
        clock.now += seconds  # in the bucket before
        watch.switch(bucket)
    clock.now += 32
    want = {START: 2 + 1, STEP: 2 + 8 + 32, DATA: 4, EVALUATION: 16}
    assert {name: x for name, x in watch.seconds().items() if x} == want


def test_what_is_compiled_in_a_bucket_is_taken_out_of_it_once():
    """JAX says how long a function took to trace, and also of each one that is traced in it."""
    clock = Clock()
    watch = Stopwatch(clock=clock)
    watch.switch(STEP)
    clock.now += 10
    watch.compiled(2.0)  # from 108 to 110
    clock.now += 1
    watch.compiled(4.0)  # from 107 to 111, the two seconds in it
    clock.now += 5
    watch.compiled(3.0)  # from 113 to 116
    assert {name: x for name, x in watch.seconds().items() if x} == {COMPILE: 7, STEP: 9}


def test_a_batch_that_is_made_while_a_step_is_computed_costs_no_data_time():
    with goodput.recording() as record:
        clock = record.stopwatch._clock = Clock()
        record.stopwatch._since = clock.now
        for hidden in (True, False):
            with goodput.spending(DATA, lambda hidden=hidden: hidden):
                clock.now += 3
        totals = record.totals()
    assert (totals[STEP], totals[DATA]) == (3, 3)


def test_jax_tells_what_it_compiles():
    x = jnp.arange(7.0)
    with goodput.recording() as record, goodput.spending(STEP):
        jax.jit(lambda x: jnp.sin(x) * 3.25).lower(x).compile()
        first = record.totals()[COMPILE]
        assert first > 0
        jnp.add(x, 1.0).block_until_ready()
    assert goodput.metrics() == {}  # nothing is recorded any more


def test_a_record_goes_on_in_its_file_and_a_torn_line_is_no_harm(tmp_path):
    began = time.time()
    for number in range(3):
        with contextlib.suppress(KeyboardInterrupt), goodput.recording() as record:
            record.open(tmp_path, {"kind": "cpu"})
            with goodput.spending(STEP):
                goodput.goes_on("sft", number)
                goodput.saved("sft", number + 1)
                before = goodput.metrics()
                time.sleep(0.01)
                after = goodput.metrics()
            assert after["goodput/step"] - before["goodput/step"] >= 0.01
            assert after["goodput/start"] == before["goodput/start"]
            raise KeyboardInterrupt
        with open(tmp_path / goodput.FILE, "a") as file:
            file.write('{"event": "saved", "ti')
    records = read(tmp_path)
    assert [record["event"] for record in records].count(STARTED) == 3
    assert records[0]["machine"] == {"kind": "cpu"}
    totals = split(records)
    assert sum(totals.values()) == pytest.approx(time.time() - began, abs=0.2)
    assert totals[LOST] >= 0.02  # what the first two did after their saves
    assert totals[STEP] >= 0.01
    shown = describe(records)
    assert shown.startswith("goodput: ")
    assert "over 3 starts" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert describe(read(tmp_path / "nothing")) == ""


def test_the_share_is_of_the_time_in_which_a_process_was_there():
    totals = dict.fromkeys(BUCKETS, 0.0) | {STEP: 6.0, START: 2.0, LOST: 4.0, DOWN: 1000.0}
    assert share(totals) == 0.5


def test_a_line_between_two_saves_is_kept_only_if_it_is_the_last_of_its_process():
    process = Process(0.0).goes_on("sft", 0)
    for _ in range(5):
        process.spend(step=1.0)
    kept = shortened(process.records)
    assert [record["event"] for record in kept] == [STARTED, GOES_ON, "beat"]
    assert kept[-1]["seconds"][STEP] == 5
