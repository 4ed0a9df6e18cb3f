"""A run whose mesh, precision or flags failed in the certificate beside it is refused."""

import json
import re

import jax
import pytest

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import as_json
from dpojax.config.saved import config_differences
from dpojax.runs.certificate import (
    CERTIFICATE,
    conditions_here,
    flags_in_force,
    require_certified,
)
from dpojax.runs.run import run
from dpojax.stages.registry import resolve
from dpojax.sweeps.sweep import run_sweep

from .conftest import tiny_config

WHY = "stuck at ln 2 = 0.6931: in 20 steps nothing was learned"
HERE = (len(jax.devices()), 1, 1)  # the mesh of the tiny config


def conditions(config, mesh=HERE):
    return conditions_here(config, "preference", mesh)


def write_certificate(folder, key, *, passes=False, **changes):
    variant = {"name": "as configured", "key": key, "passes": passes, "why": "" if passes else WHY}
    content = {"stage": "preference", "variants": [variant | changes]}
    storage.write_json(folder / CERTIFICATE, content)


def resolved(folder, **changes):
    return resolve(tiny_config(**changes), folder)


def test_a_run_whose_own_conditions_failed_is_refused_before_anything_is_made(tmp_path):
    config = tiny_config()
    write_certificate(tmp_path, conditions(config).hash)
    with pytest.raises(ConfigError) as refused:
        run(config, str(tmp_path))
    told = str(refused.value)
    assert str(tmp_path / CERTIFICATE) in told
    assert f"preference under 'as configured' failed: {WHY}" in told
    assert "--config.numerics.allow_failed" in told
    assert [path.name for path in tmp_path.iterdir()] == [CERTIFICATE]


def test_it_trains_all_the_same_where_the_config_says_so_with_a_warning(tmp_path, caplog):
    allowed = resolved(tmp_path, **{"numerics.allow_failed": True})
    write_certificate(tmp_path, conditions(allowed.config).hash)
    require_certified(allowed)
    assert WHY in caplog.text


def test_without_a_certificate_or_with_one_that_passes_nothing_happens(tmp_path, caplog):
    config = resolved(tmp_path)
    require_certified(config)
    write_certificate(tmp_path, conditions(config.config).hash, passes=True)
    require_certified(config)
    assert not caplog.records


def test_failures_under_other_conditions_do_not_concern_a_run(tmp_path, monkeypatch):
    config = resolved(tmp_path)
    here = conditions(config.config)
    others = [
        here._replace(compute_dtype="bfloat16"),
        here._replace(mesh="data 1 x fsdp 8 x tensor 1"),
        here._replace(flags="--xla_something=true"),
        here._replace(jax="0.0.1"),
        here._replace(device="another chip"),
    ]
    for other in others:
        write_certificate(tmp_path, other.hash)
        require_certified(config)
    write_certificate(tmp_path, "")  # of another order of the devices, which no run has
    require_certified(config)
    write_certificate(tmp_path, here.hash)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=true")
    require_certified(config)
    sft_alone = resolved(tmp_path, stages=("sft",))
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    require_certified(sft_alone)
    with pytest.raises(ConfigError, match="stuck"):
        require_certified(config)


def test_a_mesh_that_fails_in_float32_is_refused_in_every_precision(tmp_path):
    write_certificate(tmp_path, conditions(tiny_config()).in_any_precision().hash)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ConfigError, match="stuck"):
            require_certified(resolved(tmp_path, **{"model.compute_dtype": dtype}))


def test_flags_are_compared_in_any_order_and_without_those_that_change_no_number():
    environment = {
        "XLA_FLAGS": "--xla_b=2 --xla_force_host_platform_device_count=8  --xla_a=1",
        "LIBTPU_INIT_ARGS": "--xla_tpu_c=3 --xla_dump_to=/tmp/x",
    }
    assert flags_in_force(environment) == "--xla_a=1 --xla_b=2 --xla_tpu_c=3"
    assert flags_in_force({}) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"stage": "preference", "var', "not JSON"),
        ("[]", "not a JSON object"),
        ('{"stage": "preference"}', "'variants' is not there"),
        ('{"stage": "preference", "variants": [{"name": "x"}]}', "lacks 'key'"),
        ('{"stage": "preference", "variants": [3]}', "not subscriptable"),
    ],
)
def test_a_damaged_certificate_is_named_with_what_to_do(tmp_path, content, message):
    (tmp_path / CERTIFICATE).write_text(content)
    where = f"^{re.escape(str(tmp_path / CERTIFICATE))}: .*{message}.*scripts/certify.py"
    with pytest.raises(storage.StorageError, match=where):
        require_certified(resolved(tmp_path))


def test_a_value_of_another_type_is_damage_too(tmp_path):
    write_certificate(tmp_path, "key", passes="no")
    with pytest.raises(storage.StorageError, match="'passes' of a variant is of another type"):
        require_certified(resolved(tmp_path))


def test_a_sweep_looks_at_the_certificate_in_its_own_folder(tmp_path):
    config = tiny_config()
    write_certificate(tmp_path, conditions(config).hash)
    with pytest.raises(ConfigError, match="stuck"):
        run_sweep(config, [{"preference.beta": 0.1}, {"preference.beta": 1.0}], str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [CERTIFICATE]


def test_a_run_that_goes_on_may_change_its_mind():
    before, now = tiny_config(), tiny_config(**{"numerics.allow_failed": True})
    assert not config_differences(as_json(before), as_json(now))


def test_the_key_is_the_same_in_every_process():
    """Of what JSON has, so that a certificate that another process wrote is recognised."""
    here = conditions(tiny_config())
    again = type(here)(**json.loads(json.dumps(here._asdict())))
    assert again.hash == here.hash
