"""Laws of metrics: sums do not depend on how they were split, and a resumed file has no seam."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from dpojax import storage
from dpojax.training.metrics import (
    Metric,
    MetricWriter,
    Window,
    evaluation_line,
    merge,
    read_metrics,
)
from dpojax.training.trackers.tensorboard import TensorBoard
from tests.gcs import bucket, gcs_emulator  # noqa: F401 (fixtures)


@given(
    st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(0, 5)), min_size=1, max_size=20),
    st.integers(0, 20),
)
def test_a_merged_metric_is_numpys_weighted_mean_however_it_was_split(examples, cut):
    parts = [examples[:cut], examples[cut:]]
    metrics = [Metric(sum(x * w for x, w in part), sum(w for _, w in part)) for part in parts]
    value = merge(*metrics).value
    x, w = np.array(examples).T
    if w.sum() == 0:
        assert math.isnan(value)
    else:
        assert value == pytest.approx(np.average(x, weights=w), rel=1e-6, abs=1e-6)


def test_a_metric_is_a_pytree_that_jit_returns_and_whose_value_jit_refuses():
    metric = jax.jit(lambda x: Metric(x.sum(), x.size))(jnp.arange(4.0))
    assert metric.value == 1.5
    with pytest.raises(TypeError, match="on the host"):
        jax.jit(lambda metric: metric.value)(metric)


def test_a_window_weighs_steps_of_unequal_size_and_starts_again_after_a_flush():
    window = Window()
    window.add({"loss": Metric(jnp.float32(6), jnp.float32(3)), "rare": Metric(0.0, 0.0)})
    window.add({"loss": Metric(jnp.float32(8), jnp.float32(1))})
    values = window.flush()
    assert values["loss"] == 14 / 4
    assert math.isnan(values["rare"])
    assert window.flush() == {}


def test_a_long_window_loses_no_digits():
    window = Window()
    for _ in range(2000):
        window.add({"tokens": Metric(np.float32(2**24 + 2), np.float32(1))})
    assert window.flush()["tokens"] == 2**24 + 2


def test_a_line_holds_strict_json_with_null_for_what_json_has_not(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": jnp.float32(0.5), "kl/per_token": math.nan, "x": -math.inf})
        refuse = lambda constant: pytest.fail(f"{constant} is not JSON")
        line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
        assert isinstance(line.pop("time"), float)
        assert line == {"step": 3, "split": "train", "loss": 0.5, "kl/per_token": None, "x": None}
    assert math.isnan(read_metrics(tmp_path)[0]["x"])


def test_lines_are_on_disk_before_the_writer_is_closed_and_splits_are_told_apart(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.75})
        writer.write(1, {"loss": 0.25}, split="eval")
        assert [line["loss"] for line in read_metrics(tmp_path)] == [0.75, 0.25]
        assert [line["loss"] for line in read_metrics(tmp_path, "eval")] == [0.25]
    assert read_metrics(tmp_path / "nothing") == []


def test_a_resumed_run_has_every_step_once_also_after_a_torn_line(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "spl')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    with MetricWriter(tmp_path, resume_step=3) as writer:
        for step in (4, 5, 6):
            writer.write(step, {"loss": 10 * step})
    steps = {line["step"]: line["loss"] for line in read_metrics(tmp_path)}
    assert steps == {1: 1, 2: 2, 3: 3, 4: 40, 5: 50, 6: 60}
    assert len(read_metrics(tmp_path)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_goes_also_where_no_step_is_given(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n{"step": 2')
    with MetricWriter(tmp_path) as writer:
        writer.write(2, {})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


GARBAGE = ["NOT JSON", "{", "null", "[]", "", "\0\0\0", "{}", '{"step": "one"}', "[" * 9999]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_line_in_the_middle_is_left_out_and_the_next_writer_removes_it(
    tmp_path, garbage, caplog
):
    """Metrics are a record only: no run ends for them."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{garbage}\n{{"step": 2}}\n{{"step": 3}}\n')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    is_object = garbage.startswith('{"') or garbage == "{}"
    assert (f"{path}:2 is damaged" in caplog.text) != is_object
    MetricWriter(tmp_path, resume_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_bytes_that_are_no_text_are_left_out_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\x00\n{"step": 2}\n\x80')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_file_that_was_deleted_meanwhile_is_told_when_the_lines_are_to_be_safe(tmp_path):
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(1, {})
        writer.sync()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(storage.StorageError, match=r"metrics\.jsonl: was deleted while"):
            writer.sync()


def test_a_metric_may_not_take_the_name_of_a_column(tmp_path):
    with (
        MetricWriter(tmp_path) as writer,
        pytest.raises(ValueError, match=r"\['step'\]"),
    ):
        writer.write(1, {"step": 2.0})


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_metrics_on_a_bucket_are_resumed_like_those_on_a_disk(bucket):  # noqa: F811
    folder = f"{bucket}/run"
    for resume_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        tracker = TensorBoard(storage.as_path(folder), resume_step)
        with MetricWriter(folder, trackers=[tracker], resume_step=resume_step) as writer:
            for step in steps:
                writer.write(step, {"loss": step * len(steps)})
    assert [line["loss"] for line in read_metrics(folder)] == [3, 6, 6, 8]
    (*_, events) = storage.as_path(f"{folder}/tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_a_tag_of_tensorboard_is_the_split_and_the_name_in_the_metrics_file(tmp_path):
    with MetricWriter(tmp_path, trackers=[TensorBoard(storage.as_path(tmp_path))]) as writer:
        writer.write(7, {"rewards/margins": 0.25, "kl/per_token": 0.5}, split="eval")
        writer.write(8, {"loss": 0.75})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, scalars = path.read_bytes(), []
    while data:  # TFRecord: length (8 bytes), its checksum (4), payload, checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    assert scalars == [
        (7, "eval/rewards/margins", 0.25),
        (7, "eval/kl/per_token", 0.5),
        (8, "train/loss", 0.75),
    ]
    assert scalars == [
        (line["step"], f"{line['split']}/{name}", value)
        for line in read_metrics(tmp_path)
        for name, value in line.items()
        if name not in ("step", "split", "time")
    ]


def test_an_evaluation_is_one_line_for_a_person():
    values = {
        "loss": 0.53124,
        "rewards/accuracies": 0.712,
        "rewards/margins": 0.839,
        "displacement": 0.341,
        "kl/per_token": 0.0119,
        "something/else": 1.0,
    }
    assert evaluation_line(200, 1000, values) == (
        "step  200/1000  eval loss 0.5312  accuracy 71.2 %  margin +0.84  chosen less likely 34 %  "
        "kl 0.012 nats/token"
    )
    assert evaluation_line(5, 10, {"loss": 1.0}) == "step  5/10  eval loss 1.0000"
