"""How fast a server is asked."""

import threading
import time

import pytest

from dpojax.evaluation.judging.pacing import Pace, Stopped, backoff, call_in_threads, wait


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def starts(pace, clock, tokens):
    """When requests with these numbers of tokens begin that all come at once."""
    return [pace.reserve(count) + clock.now - 100 for count in tokens]


def test_requests_are_spaced_evenly():
    clock = Clock()
    assert starts(Pace(120, clock=clock), clock, [1, 1, 1, 1]) == [0, 0.5, 1, 1.5]


def test_tokens_are_spaced_evenly():
    clock = Clock()
    pace = Pace(tokens_per_minute=6000, clock=clock)
    assert starts(pace, clock, [100, 300, 100]) == pytest.approx([0, 1, 4])


def test_the_stricter_limit_counts():
    clock = Clock()
    assert starts(Pace(60, 6000, clock=clock), clock, [10, 500, 1]) == pytest.approx([0, 1, 6])


def test_time_that_has_passed_is_not_saved_up():
    """Else a server would get all of a minute's requests at once after a quiet minute."""
    clock = Clock()
    pace = Pace(60, clock=clock)
    pace.reserve(1)
    clock.now += 600
    assert [pace.reserve(1) for _ in range(3)] == [0, 1, 2]


def test_without_limits_nothing_waits_but_for_a_pause():
    clock = Clock()
    pace = Pace(clock=clock)
    assert starts(pace, clock, [10**9, 10**9]) == [0, 0]
    pace.pause(7)
    pace.pause(3)
    assert pace.reserve(1) == 7


def test_a_request_that_waits_already_sees_a_later_pause():
    pace = Pace(300)
    stop = threading.Event()
    pace.wait(1, stop)
    began = time.monotonic()
    timer = threading.Timer(0.05, pace.pause, [0.3])
    timer.start()
    pace.wait(1, stop)
    assert time.monotonic() - began >= 0.3
    timer.join()


def test_the_wait_doubles_up_to_a_minute_and_chance_spreads_it():
    waits = [backoff(retry, 1.0) for retry in range(20)]
    for retry, seconds in enumerate(waits):
        assert min(60, 2**retry) / 2 <= seconds <= min(60, 2**retry)
    assert len({backoff(3, 1.0) for _ in range(10)}) > 1


def test_a_wait_ends_when_it_is_stopped():
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        wait(60, stop)
    assert time.monotonic() - began < 5


def test_results_come_as_calls_end():
    release = threading.Event()

    def call(item, stop):
        if item == "slow":
            release.wait(10)
        return item

    results = call_in_threads(call, ["slow", "quick"], 2)
    assert next(results) == (1, "quick")
    release.set()
    assert list(results) == [(0, "slow")]


def test_after_an_error_calls_under_way_are_yielded_and_no_other_begins():
    all_at_work = threading.Barrier(3)
    called = []

    def call(item, stop):
        called.append(item)
        all_at_work.wait(10)
        if item == 0:
            raise ValueError("broken")
        stop.wait(10)
        time.sleep(0.2)  # it ends when the error is known
        return item

    results, error = [], None
    try:
        for result in call_in_threads(call, range(20), 3):
            results.append(result)
    except ValueError as raised:
        error = raised
    assert str(error) == "broken"
    assert sorted(results) == [(1, 1), (2, 2)]
    assert sorted(called) == [0, 1, 2]


def test_a_caller_that_stops_waits_for_nobody():
    stopped = threading.Event()

    def call(item, stop):
        if item:
            stop.wait(10)
            stopped.set()
        return item

    results = call_in_threads(call, range(100), 2)
    assert next(results) == (0, 0)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 5
    assert stopped.wait(5)


def test_nothing_to_call_is_no_result():
    assert list(call_in_threads(lambda item, stop: item, [], 4)) == []
