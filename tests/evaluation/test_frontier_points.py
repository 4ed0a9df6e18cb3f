"""A frontier's points: the file keeps every bit, and says what is wrong with it."""

import doctest
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpojax.evaluation import frontier_points
from dpojax.evaluation.frontier_points import Point, read_points, write_points

NUMBER = st.floats()
POINT = st.builds(
    Point, st.text(), st.text(), st.integers(), st.integers(), *[NUMBER] * (len(Point._fields) - 4)
)
ONE = Point("dpo", "beta=0.1", 1, 20, 2.0, 0.1, 0.8, 0.01, 30.0, 0.4, 0.05, 0.99, 0.7, 0.6, 0.02)


def bits(point):
    """Two floats are equal if their bits are, but any nan is a nan."""
    return ["nan" if x != x else struct.pack("d", x) if isinstance(x, float) else x for x in point]


@settings(max_examples=40)
@given(st.lists(POINT, max_size=3))
def test_points_read_back_as_they_were_written(tmp_path_factory, points):
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    write_points(path, points)
    assert list(map(bits, read_points(path))) == list(map(bits, points))


def test_a_single_precision_reward_is_written_as_the_number_that_it_is(tmp_path):
    write_points(tmp_path / "a.csv", [ONE._replace(reward=np.float32(0.1))])
    (got,) = read_points(tmp_path / "a.csv")
    assert got.reward == float(np.float32(0.1))
    assert (got.method, got.seed) == ("dpo", 1)


def test_points_that_cannot_be_written_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.csv"
    write_points(path, [ONE])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="float"):
        write_points(path, [ONE, ONE._replace(reward="high")])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2.0", "two", "a.csv, line 2: kl must be float, got 'two'"),
        (",20,", ",2.5,", "a.csv, line 2: step must be int, got '2.5'"),
        (",0.02\n", "\n", "a.csv, line 2: 14 columns instead of 15"),
        ("kl_error", "error", "a.csv: columns must be method,setting"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_place(tmp_path, old, new, message):
    path = tmp_path / "a.csv"
    write_points(path, [ONE])
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_points(path)


def test_the_base_is_told_from_the_points_of_the_methods():
    base = ONE._replace(method="sft")
    assert frontier_points.without_base([ONE, base]) == ([ONE], base)
    for points in ([ONE], [base, base]):
        with pytest.raises(ValueError, match="one point of the reference"):
            frontier_points.without_base(points)


def test_methods_come_in_one_order_whatever_the_order_of_the_points():
    methods = ["ipo", "preferred_ft", "dpo", "hinge", "ppo"]
    points = [ONE._replace(method=method, seed=seed) for seed in (0, 1) for method in methods]
    got = frontier_points.by_method(points)
    assert list(got) == ["dpo", "ppo", "preferred_ft", "ipo", "hinge"]
    assert [p.seed for p in got["ppo"]] == [0, 1]


def test_best_of_n_is_placed_at_the_bound_of_its_kl_and_other_points_stay():
    point = ONE._replace(method="best_of_n", setting="n=4")
    bound = math.log(4) - 3 / 4
    assert frontier_points.at_the_bound(point) == point._replace(kl=bound, kl_error=0.0)
    assert frontier_points.at_the_bound(ONE) is ONE
    with pytest.raises(ValueError, match="n=4"):
        frontier_points.at_the_bound(point._replace(setting="4"))


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(frontier_points)
    assert (result.attempted > 1, result.failed) == (True, 0)
