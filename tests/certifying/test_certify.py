"""From what processes have measured to the files in the workdir; the processes are played."""

import json
import types

import numpy as np
import pytest
from exact_measurement import EXACT, LN2

from dpojax import storage
from dpojax.certifying import certify, worker
from dpojax.certifying.report import lines_of
from dpojax.certifying.variants import baseline, variants_here, with_flags
from dpojax.config.defaults import default_config
from dpojax.config.errors import ConfigError
from dpojax.runs.certificate import CERTIFICATE, conditions_here, read_certificate

STUCK = EXACT._replace(losses=np.full(6, LN2), first_batch=np.full(2, LN2))
LIKE_ABORT = "--xla_no_such_flag=1"
GIVES_LN2 = "--xla_tpu_gives_ln_2=true"


@pytest.fixture
def played(monkeypatch):
    """Processes that write what a real one would: all is as in float32, but for one flag set."""

    def run(command, env):
        path = command[-1].removeprefix("--plan=")
        plan = worker.Plan(**storage.read_json(path))
        if plan.flags == LIKE_ABORT:
            prefix = "F1201 04:58:45.373425   17825 parse_flags_from_env.cc:234]"
            told = f"one paragraph\n\n{prefix} Unknown flags in XLA_FLAGS: {LIKE_ABORT}\n"
            return types.SimpleNamespace(returncode=-6, stderr=told)
        assert all(
            flag in env["XLA_FLAGS"] + env["LIBTPU_INIT_ARGS"] for flag in plan.flags.split()
        )
        config = default_config()
        variants = variants_here(config, "preference", 8)
        if plan.flags:
            variants = [with_flags(variants[0], plan.flags)]
        else:
            variants.insert(0, baseline(config, "preference"))
        results, folder = [], storage.as_path(plan.folder)
        for number, variant in enumerate(variants):
            found = STUCK if plan.flags == GIVES_LN2 else EXACT
            with storage.replacing(folder / f"{number}.npz") as file:
                np.savez(file, **found._asdict())
            conditions = conditions_here(config, "preference", variant.mesh)
            results.append(
                worker.Measured(
                    variant._asdict(),
                    f"{number}.npz",
                    "",
                    conditions._replace(flags=plan.flags).hash,
                    conditions._asdict(),
                    True,
                )._asdict()
            )
        content = {"stage": "preference", "variants": results}
        storage.write_json(folder / worker.MEASURED, content)
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setattr(certify, "run_process", run)


def make(folder, *flag_sets):
    return certify.certify(
        default_config(), str(folder), steps=6, is_small=True, flag_sets=flag_sets
    )


def test_where_all_is_as_in_float32_all_passes_and_nothing_else_is_left_behind(played, tmp_path):
    made = make(tmp_path)
    assert made["passes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [CERTIFICATE, certify.MARKDOWN]
    assert read_certificate(tmp_path / CERTIFICATE) == json.loads(json.dumps(made))
    assert lines_of(made)[-1] == f"All {len(made['variants'])} variants pass."


def test_a_flag_set_that_keeps_the_loss_at_ln_2_fails_and_is_named(played, tmp_path):
    made = make(tmp_path, GIVES_LN2)
    assert not made["passes"]
    (failed,) = [entry for entry in made["variants"] if not entry["passes"]]
    assert failed["name"] == GIVES_LN2
    assert failed["why"].startswith("stuck at ln 2 = 0.6931")
    assert failed["key"] not in {x["key"] for x in made["variants"] if x["passes"]}
    assert GIVES_LN2 in (tmp_path / certify.MARKDOWN).read_text()


def test_a_flag_set_whose_process_does_not_start_fails_with_its_last_words(played, tmp_path):
    made = make(tmp_path, LIKE_ABORT)
    failed = made["variants"][-1]
    assert not failed["passes"]
    assert failed["measures"] is None
    assert failed["why"].endswith(f"status -6: Unknown flags in XLA_FLAGS: {LIKE_ABORT}")
    assert LIKE_ABORT in failed["conditions"]["flags"]


def test_a_config_that_cannot_be_measured_as_it_is_leaves_the_workdir_as_it_was(
    monkeypatch, tmp_path
):
    ended = types.SimpleNamespace(returncode=1, stderr="\nConfigError: config.mesh: no\n")
    monkeypatch.setattr(certify, "run_process", lambda command, env: ended)
    with pytest.raises(ConfigError, match=r"not be measured: ConfigError: config\.mesh: no"):
        make(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_lines_of_a_certificate_fit_a_terminal_of_100_columns(played, tmp_path):
    long = "--xla_tpu_enable_latency_hiding_scheduler=true --xla_tpu_scoped_vmem_limit_kib=65472"
    table = lines_of(make(tmp_path, long))
    assert max(map(len, table)) <= 100


def test_flags_of_tpus_go_to_libtpu_and_all_others_to_xla(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_before=1")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    environment = certify.environment_with("--xla_tpu_a=1 --xla_b=2")
    assert environment["XLA_FLAGS"] == "--xla_before=1 --xla_b=2"
    assert environment["LIBTPU_INIT_ARGS"] == "--xla_tpu_a=1"


def test_several_processes_are_refused(tmp_path):
    config = default_config()
    config.distributed = True
    with pytest.raises(ConfigError, match=r"config\.distributed"):
        certify.certify(config, str(tmp_path), steps=1, is_small=True)
