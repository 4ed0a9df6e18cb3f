"""The figure of a sweep has the points of the metrics files, without what means nothing."""

import math

import matplotlib.figure
import numpy as np
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
    assert points(figures[0], "Reward accuracy") == [[[10, 75]]]


def test_a_metric_may_be_drawn_over_another_one(tmp_path, figures):
    lines = [line(0, **{"samples/reward": 0.5, "samples/kl": 2.0}), line(5, loss=1.0)]
    draw({"a": lines}, tmp_path / "sweep.png")
    assert points(figures[0], "Reward of samples against KL") == [[[2.0, 0.5]]]


def swept(betas, seeds=1, **more):
    """Members over beta and seed: their last evaluations, and what they change."""
    members, changes = {}, {}
    for beta in betas:
        for seed in range(seeds):
            name = f"beta={beta},seed={seed}"
            metrics = {"rewards/accuracies": 0.6 + 0.1 * beta + 0.02 * seed, "rewards/margins": 1.0}
            members[name] = [line(5, loss=1.0), line(10, loss=beta, **metrics, **more)]
            changes[name] = {"preference.beta": beta} | ({"seed": seed} if seeds > 1 else {})
    return members, changes


def marks(axes):
    """The points, and the lines through means, of a panel against a key."""
    points = sorted(tuple(x.get_xydata()[0]) for x in axes.lines if x.get_marker() == "o")
    means = [x.get_xydata().tolist() for x in axes.lines if x.get_marker() == "None"]
    return points, means


def test_results_stand_against_the_key_that_was_swept_with_the_means_over_seeds(tmp_path, figures):
    members, changes = swept((0.1, 1.0), seeds=2)
    draw(members, tmp_path / "sweep.png", changes=changes)
    axes = figures[0].axes[0]
    assert axes.get_title(loc="left") == "Reward accuracy"
    assert axes.get_xlabel() == "beta (logarithmic)"
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1", "1"]
    points, (means,) = marks(axes)
    np.testing.assert_allclose(points, [(0.1, 61), (0.1, 63), (1, 70), (1, 72)])
    np.testing.assert_allclose(means, [(0.1, 62), (1, 71)])


def test_a_loss_is_not_compared_where_it_is_another_measure(tmp_path, figures):
    members, changes = swept((0.1, 1.0))
    draw(members, tmp_path / "sweep.png", changes=changes, same_measure=False)
    draw(members, tmp_path / "same.png", changes=changes)
    titles = [{axes.get_title(loc="left") for axes in figure.axes} for figure in figures]
    assert "Held-out loss" not in titles[0]
    assert "Reward accuracy" in titles[0]
    assert "Held-out loss" in titles[1]


def test_settings_that_differ_in_a_second_key_have_lines_of_their_own(tmp_path, figures):
    members, changes = swept((0.1, 1.0, 5.0))
    more = {f"{name},fast": lines for name, lines in members.items()}
    changes |= {
        f"{name},fast": x | {"preference.learning_rate": 1e-3} for name, x in changes.items()
    }
    draw(members | more, tmp_path / "sweep.png", changes=changes)
    axes = figures[0].axes[0]
    assert len(marks(axes)[1]) == 2
    names = {text.get_text() for text in axes.texts}
    assert names == {"learning_rate=base", "learning_rate=0.001"}


def test_members_that_differ_in_many_keys_at_once_have_curves_alone(tmp_path, figures):
    members, changes = swept((0.1, 1.0, 5.0))
    keys = ("preference.learning_rate", "preference.steps")
    changes[next(iter(members))] |= dict.fromkeys(keys, 4)
    draw(members, tmp_path / "sweep.png", changes=changes)
    assert {axes.get_xlabel() for axes in figures[0].axes} == {"optimiser step"}


def test_words_stand_in_their_order_and_a_failed_member_has_no_result(tmp_path, figures):
    members, _ = swept((0.1, 0.2, 0.3))
    changes = dict(zip(members, [{"preference.loss": x} for x in ("dpo", "ipo", "simpo")]))
    draw(members, tmp_path / "sweep.png", changes=changes, failed=[list(members)[1]])
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["dpo", "simpo"]
    assert axes.get_xscale() == "linear"


def test_no_figure_is_written_where_nothing_is_finite(tmp_path):
    draw({"a": [line(0, loss=math.inf)]}, tmp_path / "sweep.png")
    assert list(tmp_path.iterdir()) == []


def test_there_are_at_most_six_panels(tmp_path, figures):
    names = {panel.metric for panel in sweep_figure.PANELS}
    names |= {panel.over[0] for panel in sweep_figure.PANELS if panel.over}
    draw({"a": [line(1, **dict.fromkeys(names, 1.0))]}, tmp_path / "sweep.png")
    assert len(figures[0].axes) == sweep_figure.MOST
