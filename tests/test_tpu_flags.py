"""Flags of the TPU's compiler are added to those that a user has set."""

import os

import pytest

from dpojax.tpu_flags import FLAGS, VARIABLE, use_tpu_flags

(NAME,) = FLAGS


@pytest.mark.parametrize("given", ["", "--xla_enable_async_all_gather=true"])
def test_flags_are_added_once_and_others_stay(given, monkeypatch):
    monkeypatch.setenv(VARIABLE, given)
    use_tpu_flags()
    use_tpu_flags()
    words = os.environ[VARIABLE].split()
    assert words == [*given.split(), f"--{NAME}={FLAGS[NAME]}"]


def test_a_value_that_a_user_has_chosen_stays(monkeypatch):
    monkeypatch.setenv(VARIABLE, f"--{NAME}=0")
    use_tpu_flags()
    assert os.environ[VARIABLE] == f"--{NAME}=0"
