"""Speeds are closed forms of a set clock; other programs' names hold the same numbers."""

import types

import numpy as np
import pytest

from dpojax.chips import CHIPS
from dpojax.training import pace, throughput
from dpojax.training.metric_names import aliases, parse_programs
from dpojax.training.metrics import MetricWriter, read_metrics
from dpojax.training.pace import Speed, speed_line
from dpojax.training.throughput import makers_peak

DEVICES = 4
PEAK = DEVICES * CHIPS["v5e"].flops


def rows(tokens: int, examples: int):
    return types.SimpleNamespace(segment=np.ones(tokens, int), example=np.zeros(examples, int))


@pytest.fixture
def measured(monkeypatch):
    """Flushes a speed with two steps of 300 tokens in 0.5 s each, 1e14 FLOPs a step."""
    clock = iter((0.0, 1.0, 1.0))
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(pace, "utilisation", lambda rows: 0.75)

    def flush(peak):
        speed = Speed(lambda rows: 1e14, lambda: 4e14, DEVICES, peak)
        for _ in range(2):
            speed.add(rows(300, 8))
        return speed.flush()

    return flush


def test_speeds_are_those_of_the_clock_and_mfu_is_of_the_makers_peak(measured):
    values = measured(PEAK)
    assert values["perf/tokens_per_second"] == 600
    assert values["perf/tokens_per_second_per_device"] == 150
    assert values["perf/examples_per_second"] == 16
    assert values["perf/steps_per_second"] == 2
    assert values["perf/seconds_per_step"] == 0.5
    assert values["perf/tflops_per_device"] == 50  # 2e14 FLOP/s on four devices
    assert values["perf/model_flops_utilisation"] == 0.5  # of the measured 4e14
    assert values["perf/mfu"] == pytest.approx(2e14 / (4 * 197e12))
    assert speed_line(values).endswith(
        "50 TFLOP/s, 150 tokens/s a device  25.4 % MFU, 50.0 % of a matmul"
    )


def test_a_chip_that_is_in_no_table_has_no_mfu(measured):
    values = measured(None)
    assert "perf/mfu" not in values
    assert "MFU" not in speed_line(values)
    assert speed_line({"loss": 1.0}) == ""


@pytest.mark.parametrize(
    ("platform", "kind", "peak"),
    [("tpu", "TPU v6 lite", 8 * 918e12), ("gpu", "NVIDIA H200", 8 * 989e12), ("cpu", "cpu", None)],
)
def test_the_makers_peak_is_that_of_all_devices_of_the_mesh(platform, kind, peak):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    devices = np.array([device] * 8, object)
    assert makers_peak(types.SimpleNamespace(devices=devices, size=8)) == peak
    assert throughput.chip_of(device) == next((c for c in CHIPS.values() if kind in c.kinds), None)


TRAIN = {"loss": 0.5, "learning_rate": 1e-5, "num_tokens": 9.0, "perf/seconds_per_step": 2.0}


def test_a_line_has_the_same_numbers_under_the_names_of_maxtext_and_trl(tmp_path):
    """The names are those of maxtext's metric_logger.py and of transformers' Trainer."""
    with MetricWriter(tmp_path, names=("maxtext", "trl")) as writer:
        writer.write(1, TRAIN)
        writer.write(1, {"loss": 0.25, "rewards/accuracies": 0.75}, split="eval")
    train, evaluation = read_metrics(tmp_path)
    assert TRAIN.items() <= train.items()
    assert train["learning/loss"] == 0.5
    assert train["learning/current_learning_rate"] == 1e-5
    assert train["perf/step_time_seconds"] == 2.0
    assert train["num_input_tokens_seen"] == 9.0
    assert evaluation["eval_loss"] == evaluation["eval/avg_loss"] == 0.25
    assert evaluation["eval_rewards/accuracies"] == 0.75
    assert evaluation["eval/avg_dpo_reward_accuracy"] == 0.75


def test_our_names_alone_are_written_where_nothing_else_is_asked_for():
    assert aliases(TRAIN, "train", parse_programs("")) == {}
    assert parse_programs("trl, maxtext") == ("trl", "maxtext")
    with pytest.raises(ValueError, match="'wandb' is none of trl, maxtext"):
        parse_programs("trl,wandb")
