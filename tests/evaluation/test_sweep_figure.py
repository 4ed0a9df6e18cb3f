"""The figure of a sweep has the points of the metrics files, without what means nothing."""

import math

import matplotlib.figure
import pytest

from dpojax.evaluation import sweep_figure
from dpojax.evaluation.sweep_figure import draw


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    saved = []
    save = matplotlib.figure.Figure.savefig

    def savefig(figure, path, **options):
        saved.append(figure)
        save(figure, path, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def line(step, **metrics):
    return {"split": "eval", "step": step} | metrics


def points(figure, title):
    """The points of every curve in the panel of this title."""
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    curves = [curve for curve in axes.lines if curve.get_linestyle() != "None"]
    return [curve.get_xydata().tolist() for curve in curves]


def test_each_member_has_a_curve_of_its_finite_points(tmp_path, figures):
    members = {
        "beta=0.1": [line(0, loss=0.7), line(10, loss=0.6)],
        "beta=1": [line(0, loss=math.nan), line(10, loss=0.5)],
    }
    draw(members, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    (figure,) = figures
    assert points(figure, "Held-out loss") == [[[0, 0.7], [10, 0.6]], [[10, 0.5]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(members)


def test_a_member_that_failed_is_named_so_and_its_curve_ends_in_a_cross(tmp_path, figures):
    members = {"a": [line(0, loss=0.7), line(10, loss=0.6)], "b": [line(0, loss=0.7)]}
    draw(members, tmp_path / "sweep.png", failed={"b": "not finite"})
    (figure,) = figures
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b (failed)"]
    ends = {
        marker.get_marker(): marker.get_xydata().tolist()
        for marker in figure.axes[0].lines
        if marker.get_marker() != "None"
    }
    assert ends == {"o": [[10, 0.6]], "X": [[0, 0.7]]}


@pytest.mark.parametrize("reward", ["rewards/margins", "rewards/chosen"])
def test_where_the_policy_is_the_reference_no_accuracy_is_drawn(tmp_path, figures, reward):
    lines = [
        line(0, **{"rewards/accuracies": 0.0, reward: 0.0}),
        line(10, **{"rewards/accuracies": 0.75, reward: 0.2}),
    ]
    draw({"a": lines}, tmp_path / "sweep.png")
    assert points(figures[0], "Implicit-reward accuracy") == [[[10, 75]]]


def test_a_metric_may_be_drawn_over_another_one(tmp_path, figures):
    lines = [line(0, **{"samples/reward": 0.5, "samples/kl": 2.0}), line(5, loss=1.0)]
    draw({"a": lines}, tmp_path / "sweep.png")
    assert points(figures[0], "Reward of samples against KL") == [[[2.0, 0.5]]]


def test_no_figure_is_written_where_nothing_is_finite(tmp_path):
    draw({"a": [line(0, loss=math.inf)]}, tmp_path / "sweep.png")
    assert list(tmp_path.iterdir()) == []


def test_there_are_at_most_six_panels(tmp_path, figures):
    names = {panel.metric for panel in sweep_figure.PANELS}
    names |= {panel.over[0] for panel in sweep_figure.PANELS if panel.over}
    draw({"a": [line(1, **dict.fromkeys(names, 1.0))]}, tmp_path / "sweep.png")
    assert len(figures[0].axes) == sweep_figure.MOST
