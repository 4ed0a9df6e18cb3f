"""The training figure shows what was logged: every point, at its place, under its name."""

import math

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dpojax.evaluation import plots
from dpojax.evaluation.plots import training_curves


def sft_lines(steps):
    values = np.random.default_rng(0).normal(2, 0.1, len(steps))
    return [{"step": s, "split": "train", "time": 0.0, "loss": v} for s, v in zip(steps, values)]


def dpo_line(step, split, loss=0.6):
    return {
        "step": step,
        "split": split,
        "time": 0.0,
        "loss": loss,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.2 if step else 0.1,
        "rewards/margins": 0.3 if step else 0.0,
        "rewards/accuracies": 0.75 if step else 0.0,
        "displacement": 0.25,
        "kl/per_token": 0.01,
    }


DPO = [dpo_line(0, "eval"), dpo_line(10, "train"), dpo_line(20, "train"), dpo_line(20, "eval")]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    drawn = []

    class Recorded(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(plots, "Figure", Recorded)
    return drawn


def axes_of(figure, title):
    (panel,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return panel


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_stage_that_draws_samples_shows_their_reward_and_kl(tmp_path, figures):
    lines = [
        {"step": 0, "split": "eval", "samples/reward": 0.5, "samples/kl": 0.0},
        {"step": 5, "split": "train", "objective/scores": 0.6, "objective/kl": 1.0},
        {"step": 9, "split": "train", "objective/scores": 0.7, "objective/kl": 2.0},
        {"step": 9, "split": "eval", "samples/reward": 0.8, "samples/kl": 3.0},
    ]
    training_curves({"ppo": lines}, tmp_path / "curves.png")
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    assert titles == ["Reward of samples", "KL of samples"]
    for title, train, held_out in (
        ("Reward of samples", [0.6, 0.7], [0.5, 0.8]),
        ("KL of samples", [1.0, 2.0], [0.0, 3.0]),
    ):
        axes = axes_of(figures[0], title)
        assert axes.get_xlabel() == "iteration"
        drawn = [list(line.get_ydata()) for line in axes.lines]
        assert train in drawn
        assert held_out in drawn


def test_a_run_of_two_stages_has_its_six_panels_at_the_width_of_a_readme(tmp_path, figures):
    training_curves({"sft": sft_lines(range(1, 9)), "dpo": DPO}, tmp_path / "curves.png")
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == [
        "SFT loss",
        "DPO loss",
        "Reward accuracy",
        "Rewards",
        "Divergence from reference",
        "Chosen made less likely",
    ]
    assert all(axes.get_ylabel() for axes in figures[0].axes)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1600, 880)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_every_logged_point_is_drawn_beside_the_running_mean(tmp_path, figures):
    lines = sft_lines(range(1, 91))
    training_curves({"sft": lines}, tmp_path / "curves.png")
    raw, smooth = axes_of(figures[0], "SFT loss").lines[:2]
    values = np.array([line["loss"] for line in lines])
    np.testing.assert_array_equal(raw.get_xdata(), range(1, 91))
    np.testing.assert_array_equal(raw.get_ydata(), values)
    expected = np.convolve(values, np.ones(7) / 7, mode="valid")  # half-width 90 // 30 = 3
    np.testing.assert_allclose(smooth.get_ydata()[3:-3], expected, rtol=1e-12)
    assert smooth.get_ydata()[0] == pytest.approx(values[:4].mean())


def test_the_loss_at_the_reference_is_a_named_level(tmp_path, figures):
    identity = {"step": 0, "split": "identity", "loss": 0.69, "loss/at_reference": math.log(2)}
    training_curves({"dpo": [identity, *DPO]}, tmp_path / "curves.png")
    axes = axes_of(figures[0], "DPO loss")
    assert texts(axes) == ["log 2"]
    assert math.log(2) in [line.get_ydata()[0] for line in axes.lines]
    identity = {"step": 0, "split": "identity", "loss": 0.25, "loss/at_reference": 0.25}
    training_curves({"ipo": [identity, *DPO]}, tmp_path / "curves.png")
    axes = axes_of(figures[1], "IPO loss")
    assert texts(axes) == ["policy = reference"]
    assert 0.25 in [line.get_ydata()[0] for line in axes.lines]


def test_a_loss_without_a_known_value_at_the_reference_gets_no_level(tmp_path, figures):
    training_curves({"dpo": DPO}, tmp_path / "curves.png")
    assert texts(axes_of(figures[0], "DPO loss")) == []


def test_labelled_responses_are_counted_as_responses(tmp_path, figures):
    labelled = [{k: v for k, v in line.items() if k != "rewards/margins"} for line in DPO]
    training_curves({"dpo": labelled}, tmp_path / "curves.png")
    assert axes_of(figures[0], "DPO loss").get_ylabel() == "loss per response"
    assert axes_of(figures[0], "Chosen made less likely").get_ylabel() == "% of responses"


def test_accuracy_is_in_percent_and_left_out_where_policy_and_reference_are_equal(
    tmp_path, figures
):
    training_curves({"dpo": DPO}, tmp_path / "curves.png")
    axes = axes_of(figures[0], "Reward accuracy")
    shown = [(line.get_xdata(), line.get_ydata()) for line in axes.lines if len(line.get_xdata())]
    for steps, values in shown[:-1]:  # the last is the level of chance
        assert 0 not in list(steps)
        np.testing.assert_allclose(values, 75)
    assert texts(axes) == ["chance"]


def test_rewards_are_named_at_their_ends_without_overlap(tmp_path, figures):
    training_curves({"dpo": DPO}, tmp_path / "curves.png")
    labels = axes_of(figures[0], "Rewards").texts
    assert [label.get_text() for label in labels] == ["rejected", "chosen", "margin"]
    heights = [label.get_position()[1] for label in labels]
    assert min(np.diff(heights)) > 0.08


@pytest.mark.parametrize(
    ("metrics", "panels"),
    [
        ({}, 0),
        ({"sft": []}, 0),
        ({"sft": sft_lines([5])}, 1),
        ({"sft": [{"step": 1, "split": "train", "loss": math.nan}]}, 0),
        ({"dpo": [dpo_line(7, "eval")]}, 5),
        ({"dpo": [{"step": 3, "split": "train", "rewards/margins": 0.5}]}, 1),
        ({"sft": sft_lines([1, 2]), "dpo": [{"step": 3, "split": "train", "loss": 0.5}]}, 2),
    ],
)
def test_what_was_not_logged_is_left_out(tmp_path, figures, metrics, panels):
    training_curves(metrics, tmp_path / "curves.png")
    assert len(figures[0].axes) == panels
    with Image.open(tmp_path / "curves.png") as image:
        image.verify()


def test_the_users_matplotlib_settings_are_left_alone(tmp_path):
    settings = lambda: {name: matplotlib.rcParams[name] for name in plots.STYLE}
    before = settings()
    training_curves({"dpo": DPO}, tmp_path / "curves.pdf")
    assert settings() == before
    assert before != plots.STYLE
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def torn(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(OSError, match="disk full"):
        training_curves({"dpo": DPO}, path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
