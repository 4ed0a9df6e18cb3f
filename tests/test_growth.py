"""The benchmark of growth: laws catch what grows faster, and its counts are the closed forms."""

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.growth_laws import curves, fit, sent_bytes, step_flops
from benchmarks.growth_programs import STUDIES, Point, build
from benchmarks.train_step import Case, synthetic_rows

TINY = Case(2, 16, 2, 40, pairs=2, prompt=4, response=2, row_length=8, max_positions=8)


def members_that_take(seconds) -> list[dict]:
    """Records of 1, 2, 4, 8 members, exact but for their times."""
    case = TINY._asdict()
    fixed = {"study": "members", "case": case, "rows": 2, "scored": 8, "compile_seconds": 1.0}
    records = []
    for count in (1, 2, 4, 8):
        record = fixed | {
            "x": count,
            "members": count,
            "devices": 1,
            "samples": [seconds(count), 99.0],
        }
        record |= {"temporary": 100 + count, "arguments": count}
        records.append(record | {"flops": step_flops(record)})
    return records


def test_factors_are_not_negative_and_the_last_point_is_foretold_by_the_others():
    x = np.array([1.0, 2, 4, 8])
    terms = np.stack([np.ones(4), x], axis=1)
    np.testing.assert_allclose(fit(terms, np.array([5.0, 7, 11, 1e6])), [3, 2], rtol=1e-6)
    assert (fit(terms, 9.0 - x) >= 0).all()


def test_linear_times_hold_and_quadratic_ones_do_not():
    linear = curves(members_that_take(lambda n: 3.0 + 2 * n))
    assert [curve.quantity for curve in linear] == ["seconds", "temporary", "flops"]
    assert all(curve.holds for curve in linear)
    assert linear[0].excess == pytest.approx(1)
    quadratic = curves(members_that_take(lambda n: 3.0 + 2 * n**2))
    assert [curve.holds for curve in quadratic] == [False, True, True]


@pytest.mark.parametrize(("reduced", "holds"), [(lambda n: 1.0, True), (lambda n: n / 64, False)])
def test_a_table_may_be_reduced_once_more_but_not_once_for_each_chunk(reduced, holds):
    records = []
    for size in (64, 128, 256, 512):
        case = TINY._replace(vocabulary=size, max_logits=512)
        table = 4 * size * case.width
        record = {
            "study": "chunks",
            "case": case._asdict(),
            "x": size,
            "mesh": "data",
            "devices": 1,
        }
        record |= {"rows": 2, "scored": 8, "members": 0, "matrices": 0}
        record["parameters"] = 9_000 + size * case.width
        record |= {"collective_bytes": {"all-reduce": 36_000 + table + reduced(size) * table}}
        records.append(record | {"flops": step_flops(record)})
    bytes_, flops = curves(records)
    assert (bytes_.quantity, bytes_.holds, flops.holds) == ("collective bytes", holds, True)


def test_growth_beyond_the_law_is_said_and_is_the_exit_code(capsys, monkeypatch):
    class Here:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, _, study, rounds):
            assert (study, rounds) == ("members", 2)
            return self

        def result(self):
            return members_that_take(lambda n: n**2)

    monkeypatch.setattr(growth, "ProcessPoolExecutor", Here)
    assert growth.main(["--study", "members", "--rounds", "2"]) == 1
    printed = capsys.readouterr().out
    assert "| members | seconds | a + b members |" in printed
    assert "grew faster than the mathematics: members  seconds" in printed


LONG = {"prompt": 200, "response": 100, "row_length": 400, "max_positions": 400}


@pytest.mark.long
@pytest.mark.parametrize("case", [TINY._replace(max_logits=400), TINY._replace(**LONG)])
def test_a_step_multiplies_and_sends_what_the_closed_forms_say(case):
    """On two devices; the longer row is of four stretches."""
    point = Point(2, case, mesh="data", devices=2)
    record = point._asdict() | {"case": point.case._asdict()} | build(point).facts
    assert 2 * record["flops"] == step_flops(record)
    sent = sum(record["collective_bytes"].values())
    # The tied table's two gradients are reduced apart; metrics are a few numbers.
    tied = 4 * point.case.vocabulary * point.case.width
    assert 0 <= sent - sent_bytes(record) - tied < 200


@pytest.mark.slow
def test_every_point_is_one_micro_batch_of_full_rows():
    for point in (point for points in STUDIES.values() for point in points):
        rows = synthetic_rows(point.case)
        assert len(rows.tokens) == 1
        assert (rows.segment > 0).all()


def test_points_differ_in_what_the_study_varies():
    for name, points in STUDIES.items():
        assert len(set(points)) == len(points) >= 4, name
    tokens = {point.case.pairs * point.case.row_length for point in STUDIES["tokens"]}
    assert tokens == {4096}
    assert {(p.case.prompt, p.case.response) for p in STUDIES["responses"]} == {(256, 32)}
