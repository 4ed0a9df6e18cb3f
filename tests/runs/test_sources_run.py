"""A run on several sources: shares of every batch, metrics of each, and what the report says."""

import json

import pytest

from dpojax.config.errors import ConfigError
from dpojax.data.records import DataError
from dpojax.runs import run as runs
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(i, good=" was good"):
    return {"prompt": f"the film {i}", "chosen": good, "rejected": " was bad"}


def prepared(config, folder):
    config.stages = ("preference",)
    return open_stage(prepare_setup(resolve(config, folder)), "preference").prepare()


@pytest.fixture
def two(tiny, tmp_path):
    """(changes) -> a config of 90 pairs in one file and 30 in another."""
    many = write(tmp_path / "many.jsonl", [pair(i) for i in range(90)])
    few = write(tmp_path / "few.jsonl", [pair(1000 + i, " was great") for i in range(30)])

    def config(**changes):
        data = {"source": f"{many},{few}", "limit": 0, "eval_limit": 0, **changes}
        return tiny(**{f"preference.data.{key}": value for key, value in data.items()})

    return config


def test_without_weights_the_sources_are_one_data_set_whose_held_out_parts_lie_apart(two, tmp_path):
    data = prepared(two(), tmp_path / "run").batches.data
    assert [part.name for part in data.sources] == ["many", "few"]
    assert [sum(part[i] for part in data.sources) for i in (1, 2)] == [data.train, 120 - data.train]
    assert (data.mixture, data.epoch) == (None, data.train)
    for name, indices in data.held_out_by_source.items():
        assert {data.examples[i].id.split(".")[0] for i in indices} == {name}
        assert {data.sources[data.examples[i].source].name for i in indices} == {name}
    assert sum(map(len, data.held_out_by_source.values())) == len(data.held_out)


def test_an_epoch_ends_with_the_source_that_is_used_up_first_and_the_report_says_so(two, tmp_path):
    config = two(weights=(1.0, 1.0))
    config.preference.steps = 0
    stage = prepared(config, tmp_path / "run")
    data, (many, few) = stage.batches.data, stage.batches.data.sources
    assert data.epoch == 2 * few.train
    assert stage.steps == -(-data.epoch // config.preference.batch_size)
    assert data.reports["train and eval"].remarks == [
        f"the mixture: an epoch has {2 * few.train} of the {data.train} examples to train on, "
        f"{few.train} of {many.train} from many (weight 1), {few.train} of {few.train} from few "
        "(weight 1); the next epoch goes on with those that are left"
    ]


def test_limits_hold_for_each_source(two, tmp_path):
    config = two(limit=20, eval_limit=1, eval_share=0.3)
    data = prepared(config, tmp_path / "run").batches.data
    assert [part.held_out for part in data.sources] == [1, 1]
    report = data.reports["train and eval"]
    assert report.read == 40
    assert len(data.examples) == 40 - report.number("dropped", "beyond_eval_limit")
    assert report.remarks == [
        f"{name}: reading stopped at limit=20; what follows was not read"
        for name in ("many", "few")
    ]


def test_weights_that_fit_no_source_are_refused(two, tmp_path):
    for weights in ((1.0,), (1.0, 2.0, 3.0), (1.0, 0.0), (1.0, -1.0)):
        with pytest.raises(
            ConfigError, match=r"weights .* one number above 0 for each .*many, few"
        ):
            prepared(two(weights=weights), tmp_path / "run")


def test_files_of_one_name_have_ids_and_sources_of_their_own(tiny, tmp_path):
    paths = [
        write(tmp_path / x / "a.jsonl", [pair(i + 50 * n) for i in range(20)])
        for n, x in enumerate("xy")
    ]
    config = tiny(**{"preference.data.source": ", ".join(paths), "preference.data.limit": 0})
    data = prepared(config, tmp_path / "run").batches.data
    assert [part.name for part in data.sources] == ["x/a", "y/a"]
    assert len({example.id for example in data.examples}) == 40


def test_an_empty_source_among_others_is_named(two, tmp_path):
    (tmp_path / "few.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"few\.jsonl: the data set is empty"):
        prepared(two(), tmp_path / "run")


def test_held_out_sources_are_told_apart_in_any_order(two, tiny, tmp_path):
    config = two()
    one = write(tmp_path / "eval" / "few.jsonl", [pair(2000 + i) for i in range(3)])
    other = write(tmp_path / "eval" / "new.jsonl", [pair(3000 + i) for i in range(4)])
    last = write(tmp_path / "eval" / "many.jsonl", [pair(4000 + i) for i in range(5)])
    config.preference.data.eval_source = f"{other},{one},{last}"
    data = prepared(config, tmp_path / "run").batches.data
    assert [part[:3] for part in data.sources] == [("many", 90, 5), ("few", 30, 3), ("new", 0, 4)]
    for name, indices in data.held_out_by_source.items():
        assert {data.examples[i].id.split(".")[0] for i in indices} == {name}
        assert {data.sources[data.examples[i].source].name for i in indices} == {name}


@pytest.mark.slow
def test_evaluations_and_the_summary_have_the_metrics_of_each_source(two, tmp_path):
    config = two(eval_share=0.3, weights=(1.0, 1.0))
    config.stages = ("preference",)
    config.preference.steps = 2
    runs.run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "preference" / "metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if line["split"] == "eval"][-1]
    data = prepared(config, tmp_path / "run").batches.data
    counts = {name: len(part) for name, part in data.held_out_by_source.items()}
    assert {*counts} == {"many", "few"}
    for metric in ("loss", "rewards/accuracies", "rewards/margins"):
        mean = sum(last[f"{x}/{metric}"] * n for x, n in counts.items()) / sum(counts.values())
        assert last[metric] == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert last["many/loss"] != last["few/loss"]
    summary = json.loads((tmp_path / "run" / "preference" / "summary.json").read_text())
    assert summary["by_source"]["few"]["after"]["loss"] == pytest.approx(last["few/loss"], rel=1e-5)
    text = (tmp_path / "run" / "preference" / "summary.txt").read_text()
    assert "of those from few" in text
