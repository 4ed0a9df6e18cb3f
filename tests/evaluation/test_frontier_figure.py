"""The frontier's figure shows every point, the true fronts, and no limit where none is known."""

import math

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from PIL import Image

from dpojax.evaluation import frontier_figure
from dpojax.evaluation.frontier_points import by_method
from dpojax.evaluation.optimum import trusted_up_to
from tests import finished_frontier


@pytest.fixture(scope="module")
def run():
    return finished_frontier.run(samples=256)


@pytest.fixture(scope="module")
def axes(run):
    """Of rewards, and of shares."""
    return frontier_figure.figure(*run).axes


def lines_with(axes, color, marker="None"):
    """Data of the lines of a colour: those with marks, or those without."""
    same = lambda line: matplotlib.colors.same_color(line.get_color(), color)
    return [line.get_xydata() for line in axes.lines if same(line) and line.get_marker() == marker]


def brute_force_front(points):
    """Those that no other point beats, by rising KL."""
    better = lambda a, b: a[0] <= b[0] and a[1] >= b[1] and a != b
    return sorted(p for p in points if not any(better(q, p) for q in points))


def test_every_checkpoint_of_every_run_is_drawn(run, axes):
    methods = by_method(run[0])
    drawn = [c.get_offsets() for c in axes[0].collections if isinstance(c, PathCollection)]
    drawn = {tuple(xy) for offsets in drawn for xy in np.asarray(offsets)}
    expected = {(p.kl, p.reward) for p in run[0] if p.method != "best_of_n"}
    assert drawn == expected
    assert len(methods) == 7
    assert len(expected) > 200


@pytest.mark.parametrize("method", finished_frontier.METHODS)
def test_the_line_of_a_method_is_its_front_and_only_the_front_has_bars(run, axes, method):
    color, _ = frontier_figure.LOOKS[method]
    front = brute_force_front([(p.kl, p.reward) for p in run[0] if p.method == method])
    (line,) = lines_with(axes[0], color)
    assert line.tolist() == [list(p) for p in front]
    (bars,) = [
        c for c in axes[0].containers if matplotlib.colors.same_color(c.lines[0].get_color(), color)
    ]
    assert bars.lines[0].get_xydata().tolist() == [list(p) for p in front]
    errors = {p.kl: (p.kl_error, p.reward_error) for p in run[0]}
    for collection, column in zip(bars.lines[2], (0, 1)):
        ends = np.array(collection.get_segments())
        got = np.ptp(ends[:, :, column], axis=1)
        np.testing.assert_allclose(got, [4 * errors[kl][column] for kl, _ in front], rtol=1e-9)


def test_best_of_n_stands_at_its_bound(axes):
    (marks,) = lines_with(axes[0], "#333333", "*")
    n = np.array([2, 4, 8, 16, 32, 64, 128, 256])
    np.testing.assert_allclose(marks[:, 0], np.log(n) - (n - 1) / n, rtol=1e-12)


def test_best_of_n_has_an_open_mark_where_ties_make_its_kl_smaller(run):
    points, curve, base = run
    tied = [p._replace(kl=0.5 * p.kl) for p in points if p.method == "best_of_n"]
    axes = frontier_figure.figure(tied, curve, base).axes[0]
    drawn = lines_with(axes, "C0", "*") + lines_with(axes, "#333333", "*")
    drawn += [li.get_xydata() for li in axes.lines if li.get_markerfacecolor() == "none"]
    assert any([list(xy) for xy in xys] == [[p.kl, p.reward] for p in tied] for xys in drawn)


def test_the_limit_starts_at_the_reference_and_stops_where_it_is_not_trusted(run, axes):
    (limit,) = [line.get_xydata() for line in axes[0].lines if line.get_label() == "limit"]
    assert limit[0, 0] == 0
    np.testing.assert_allclose(limit[0, 1], run[2].reward, rtol=1e-9)
    np.testing.assert_allclose(limit[-1, 0], trusted_up_to(run[1]), rtol=1e-12)
    assert np.isfinite(limit).all()
    assert "limit not known here" in [text.get_text() for text in axes[1].texts]


def test_every_method_is_named_inside_the_axes_and_no_two_names_overlap(axes):
    names = {"DPO", "Online DPO", "PPO (learned reward)", "PPO-GT", "Best of n", "Unlikelihood"}
    names |= {"Preferred-FT", "theoretical limit", "SFT (reference)"}
    assert names < {text.get_text() for text in axes[0].texts}
    axes[0].figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes[0].texts]
    inside = axes[0].get_window_extent()
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert inside.x0 <= box.x0
        assert box.x1 <= inside.x1
        assert inside.y0 <= box.y0
        assert box.y1 <= inside.y1


def test_runs_are_labelled_by_what_was_swept_and_each_label_is_beside_its_run(run, axes):
    beta, alpha = "\N{GREEK SMALL LETTER BETA}", "\N{GREEK SMALL LETTER ALPHA}"
    labels = {text.get_text(): text for text in axes[0].texts}
    assert {f"{beta}=0.05", f"{alpha}=1", "target 0.02", "n=16"} < labels.keys()
    assert "square-root scale" in axes[1].get_xlabel()
    for setting, name in (("beta=0.05", f"{beta}=0.05"), ("alpha=1", f"{alpha}=1")):
        text = labels[name]
        at = {(p.kl, p.reward) for p in run[0] if p.setting == setting}
        assert tuple(text.xy) in at
        place = axes[0].transData.transform(text.xy)
        box = text.get_window_extent().get_points()
        gap = np.maximum(np.maximum(box[0] - place, place - box[1]), 0)
        assert np.hypot(*gap) < 60  # pixels, of 1,400


def test_the_name_of_a_method_is_nearest_to_its_own_front(axes):
    """Pixels between a label and the lines of its own colour, and of all others."""
    scene = axes[0].transData.transform

    def distance(text, line):
        xy = scene(line.get_xydata())
        steps = np.linspace(0, len(xy) - 1, 400)
        xy = np.stack([np.interp(steps, np.arange(len(xy)), column) for column in xy.T], axis=1)
        low, high = text.get_window_extent().get_points()
        return np.hypot(*np.maximum(np.maximum(low - xy, xy - high), 0).T).min()

    names = {text.get_text(): text for text in axes[0].texts}
    for method, name in (("dpo", "DPO"), ("ppo", "PPO (learned reward)"), ("ppo_gt", "PPO-GT")):
        color, _ = frontier_figure.LOOKS[method]
        own = [x for x in axes[0].lines if matplotlib.colors.same_color(x.get_color(), color)]
        assert min(distance(names[name], line) for line in own) < 40


def test_methods_are_told_apart_by_colour_and_by_mark():
    looks = list(frontier_figure.looks_of([*frontier_figure.LOOKS, "ipo", "kto", "hinge"]).values())
    assert len(set(looks)) == len(looks)
    assert len({mark for _, mark in looks}) == len(looks)


def test_without_a_trusted_limit_and_with_points_that_are_not_numbers_it_still_draws(run):
    points, curve, base = run
    unknown = curve._replace(trusted=np.zeros_like(curve.trusted))
    some = [points[0]._replace(method="ipo", kl=math.nan), *points[1:9]]
    axes = frontier_figure.figure(some, unknown, base).axes
    assert not [line for line in axes[0].lines if line.get_label() == "limit"]
    texts = {text.get_text() for text in axes[0].texts}
    assert {"DPO", "SFT (reference)"} < texts
    assert "theoretical limit" not in texts
    nothing = frontier_figure.figure([], unknown, base).axes[0]
    assert [text.get_text() for text in nothing.texts] == ["SFT (reference)"]


@pytest.mark.slow
def test_the_files_are_written_whole_or_not_at_all(run, tmp_path):
    points, curve, base = run
    png, pdf = tmp_path / "frontier.png", tmp_path / "frontier.pdf"
    frontier_figure.draw(points[:40], curve, base, png, pdf)
    with Image.open(png) as image:
        assert image.size[0] >= 1400
    assert pdf.read_bytes().startswith(b"%PDF")
    before = png.read_bytes()
    with pytest.raises(ValueError, match="not supported"):
        frontier_figure.draw(points[:9], curve, base, tmp_path / "frontier.what")
    assert png.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["frontier.pdf", "frontier.png"]


@pytest.mark.slow
def test_a_method_far_beyond_all_others_does_not_squeeze_them(run):
    points, curve, base = run
    widest = max(p.kl for p in points)
    far = [p._replace(method="simpo", kl=20 * widest + i) for i, p in enumerate(points[:3])]
    rewards, _ = frontier_figure.figure([*points, *far], curve, base).axes
    assert widest < rewards.get_xlim()[1] < 1.2 * widest
    assert "Pareto fronts" in rewards.get_title("left")
    assert f"not shown: 3 of simpo, to {20 * widest + 2:.0f} nats" in rewards.get_title("left")
