"""A whole run: what it leaves behind, and that nothing that kills it changes the result."""

import json
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.config.saved import read_run_config
from dpojax.data.records import DataError
from dpojax.models import decoder
from dpojax.models.attention import plain_rows
from dpojax.models.decoder import SHARDING_RULES
from dpojax.runs import run
from dpojax.runs.export import export
from dpojax.stages import batches, preference, references
from dpojax.stages import stage as stage_module
from dpojax.stages.preference import Preference
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup
from dpojax.stages.sft import SFT
from dpojax.training import checkpoints, goodput, reference
from dpojax.training.checkpoints import writing
from dpojax.training.compilation_cache import shared_programs
from dpojax.training.loop import NonFiniteLoss
from dpojax.training.reference import ReferenceMismatch
from dpojax.training.state import abstract_state, make_optimizer

from .. import metrics_page
from .conftest import command, environment, lines, tiny_config, train

DEVICES = 8


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed, in a process of its own with one device."""
    workdir = tmp_path_factory.mktemp("finished")
    done = train(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def saved_arrays(workdir, stage="preference", step=6):
    """Every array of a checkpoint: parameters, moments, step and key."""
    config = read_run_config(workdir)
    setup = prepare_setup(resolve(config, workdir))
    optimizer = make_optimizer(config[stage].optimizer)
    abstract = abstract_state(setup.abstract_params, optimizer, setup.mesh, SHARDING_RULES)
    with checkpoints.Checkpoints(workdir / stage / "checkpoints") as saved:
        state, _ = saved.restore(abstract, step=step)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same_result(workdir, finished):
    for ours, theirs in zip(saved_arrays(workdir), saved_arrays(finished), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    values = lambda line: {
        k: v for k, v in line.items() if not k.startswith(("time", "perf/", "goodput/", "memory/"))
    }
    for stage in ("sft", "preference"):
        assert list(map(values, lines(workdir, stage))) == list(map(values, lines(finished, stage)))


def test_a_run_leaves_metrics_reports_a_summary_and_a_figure(finished):
    workdir, printed = finished
    assert json.loads((workdir / "config.json").read_text())["preference"]["beta"] == 0.1
    assert (workdir / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    for stage in ("sft", "preference"):
        assert json.loads((workdir / stage / "data_report.json").read_text())["train"]
    assert "held-out pairs" in printed
    assert (workdir / "preference" / "summary.txt").read_text().strip() in printed
    steps = [line["step"] for line in lines(workdir, "preference") if line["split"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_begins_with_what_it_computes_on_and_ends_with_where_its_time_went(finished):
    begins, ends = finished[1].split("\n\n")[0], finished[1].strip().splitlines()[-2:]
    shown = dict(line.split(None, 1) for line in begins.splitlines() if line[0] != " ")
    assert shown["devices"] == "1 x cpu in 1 process"
    assert shown["mesh"] == "data 1 x fsdp 1 x tensor 1"
    assert shown["compute"] == "float32, attention xla, remat dots"
    assert f"jax {jax.__version__}" in shown["versions"]
    flags = " ".join(begins.partition("XLA_FLAGS=")[2].split())
    assert flags == " ".join(environment()["XLA_FLAGS"].split())
    assert re.match(r"goodput: [\d.]+ % of [\d.]+ (s|min) were train steps", ends[0])
    assert all(f"{name} " in ends[1] for name in ("start", "compile", "step", "evaluation"))
    assert max(map(len, [*begins.splitlines(), *ends])) <= 100


def test_metrics_carry_the_names_of_trl(finished):
    trained = {"loss", "grad_norm", "learning_rate", "num_tokens", "displacement"}
    trained |= {"log_ratio/chosen", "log_ratio/rejected"}
    pair = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    pair |= {"logps/chosen", "logps/rejected"}
    evaluated = {"logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"}
    by_split = {line["split"]: set(line) for line in lines(finished[0], "preference")}
    speeds = {"perf/tokens_per_second_per_device", "perf/tflops_per_device", "goodput/share"}
    assert by_split["train"] >= trained | pair | speeds
    assert "kl/per_token" not in by_split["train"]  # it is measured on held-out contexts alone
    assert "perf/mfu" not in by_split["train"]  # nobody states the peak of this CPU
    assert by_split["eval"] >= pair | evaluated | {"loss", "displacement", "kl/per_token"}


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_every_number_of_a_run_is_defined_in_docs_metrics(finished, stage):
    assert metrics_page.undefined(lines(finished[0], stage)) == set()


def test_at_step_zero_the_policy_is_the_reference(finished):
    identity, first = lines(finished[0], "preference")[:2]
    assert identity["split"] == "identity"
    assert identity["drift/reference_identity"] < 1e-5
    np.testing.assert_allclose(identity["loss"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(identity["loss/at_reference"], np.log(2), rtol=1e-6)
    assert (first["rewards/margins"], first["displacement"], first["kl/per_token"]) == (0, 0, 0)


def test_evaluation_against_the_reference_gives_log_two_there_and_the_last_metrics_at_the_end(
    finished,
):
    setup = prepare_setup(resolve(read_run_config(finished[0]), finished[0]))
    stage = open_stage(setup, "preference").prepare()
    reference = stage.evaluate(references.saved_weights(stage))
    assert reference["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert reference["rewards/margins"] == 0
    logged = [line for line in lines(finished[0], "preference") if line["split"] == "eval"][-1]
    after = stage.evaluate(stage.trained_params())
    for name in ("loss", "rewards/margins", "logps/chosen", "kl/per_token"):
        assert after[name] == pytest.approx(logged[name], abs=1e-4)
    summary = json.loads((finished[0] / "preference" / "summary.json").read_text())
    assert summary["kl_per_token_exact"]["after"] == pytest.approx(logged["kl/per_token"], rel=1e-4)
    assert logged["kl/per_token"] > 1e-6


@pytest.mark.long
def test_the_weights_of_a_stage_that_is_trained_are_read_only_when_they_are_needed(
    finished, tmp_path, monkeypatch
):
    """A resumed preference stage has its own checkpoint; a copy of SFT's would take memory."""
    shutil.copytree(finished[0], tmp_path / "run")
    storage.remove_folder(tmp_path / "run" / "preference" / "checkpoints" / "6")
    (tmp_path / "run" / "finished.json").unlink()
    monkeypatch.setattr(SFT, "trained_params", lambda self, step=None: pytest.fail("SFT was read"))
    run.run(read_run_config(storage.as_path(tmp_path / "run")), tmp_path / "run")
    assert (tmp_path / "run" / "finished.json").exists()


@pytest.mark.slow
def test_the_same_command_again_only_prints_the_summary(finished):
    workdir, _ = finished
    before = saved_arrays(workdir)
    again = train(workdir)
    assert again.returncode == 0, again.stderr
    assert (workdir / "preference" / "summary.txt").read_text().strip() in again.stdout
    for a, b in zip(saved_arrays(workdir), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(finished, tmp_path):
    """kill -9 once in each stage: right after a checkpoint, and in the middle of things."""
    for checkpoint in ("sft/checkpoints/2", "preference/checkpoints/4"):
        process = subprocess.Popen(
            command(tmp_path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while not (tmp_path / checkpoint).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.communicate()
    assert train(tmp_path).returncode == 0
    assert_same_result(tmp_path, finished[0])
    records = goodput.read(tmp_path)
    totals = goodput.split(records)
    assert [record["event"] for record in records].count(goodput.STARTED) == 3
    assert sum(totals.values()) == pytest.approx(records[-1]["time"] - records[0]["time"], abs=0.1)
    assert totals[goodput.DOWN] > 0


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_the_code_of_the_config_and_the_run_goes_on(finished, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, checkpoint_every=0, exit_code_when_stopped=85),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("preference  step 0/6"):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 85, errors
    assert "saved; the same command goes on" in errors
    steps = [int(p.name) for p in (tmp_path / "preference" / "checkpoints").iterdir()]
    assert len(steps) == 1
    assert steps[0] < 6
    assert train(tmp_path, checkpoint_every=0).returncode == 0
    assert_same_result(tmp_path, finished[0])
    totals = goodput.split(goodput.read(tmp_path))
    assert totals[goodput.LOST] < 0.5  # it saved when it was stopped
    assert totals[goodput.DOWN] > 0


def test_the_exported_folder_gives_the_same_log_probs_in_transformers(finished, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = export(str(finished[0]), str(tmp_path / "exported"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("the acting was not bad")["input_ids"]])
    with torch.no_grad():
        theirs = torch.log_softmax(model(ids).logits, -1)[0].numpy()
    setup = prepare_setup(resolve(read_run_config(finished[0]), finished[0]))
    folder = finished[0] / "preference" / "checkpoints"
    params = checkpoints.load_params(folder, setup.abstract_params)
    ours = jax.nn.log_softmax(decoder.logits(setup.model, params, plain_rows(ids.numpy())))[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_export_says_what_is_missing(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is not there"):
        export(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="without a stage 'ppo'"):
        export(str(finished[0]), str(tmp_path / "out"), stage="ppo")
    with pytest.raises(checkpoints.CheckpointError, match="5"):
        export(str(finished[0]), str(tmp_path / "out"), step=5)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A run in this process, of which a part can be replaced."""

    def start(**changes):
        run.run(tiny_config(**changes), str(tmp_path / "run"))
        return tmp_path / "run"

    return start


@pytest.mark.long
def test_a_live_reference_gives_the_numbers_of_the_cached_one(started, finished):
    """On eight devices against one: at step 0, and the gradient of step 1. (Later, Adam turns
    rounding in gradients near zero into steps of full size.)"""
    workdir = started(**{"preference.reference.kind": "live"})
    values = lambda folder: [
        [line.get(k, 0.0) for k in ("loss", "grad_norm", "logps/chosen", "logps/rejected")]
        for line in lines(folder, "preference")
        if line["step"] <= 1
    ]
    np.testing.assert_allclose(values(workdir), values(finished[0]), rtol=1e-4)
    assert not (workdir / "preference" / "reference_logprobs").exists()


@pytest.mark.long
def test_a_second_run_computes_no_log_probs_that_a_first_one_has_kept(tmp_path, monkeypatch):
    """In another workdir; those of other weights are not taken."""
    cache, computed, scored = tmp_path / "kept", [], []
    compute, build_programs = reference.compute, Preference.build_programs

    def counted(setup):
        programs = build_programs(setup)

        def score(*args, **named):
            scored.append(args)
            return programs.score(*args, **named)

        return programs._replace(score=score)

    monkeypatch.setattr(reference, "compute", lambda *args: computed.append(args) or compute(*args))
    monkeypatch.setattr(Preference, "build_programs", staticmethod(counted))

    def start(name):
        scored.clear()
        changes = {"preference.reference.cache": str(cache), "preference.steps": 1}
        config = tiny_config(**changes | {"preference.data.eval_limit": 4})
        config.stages = ("preference",)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preference, "open_summary", lambda stage: lambda *_: None)
            patch.setattr(run, "finish", lambda *_: None)
            run.run(config, str(tmp_path / name))
        return len(computed), len(scored), lines(tmp_path / name, "preference")[:2]

    after_first, _, first = start("first")
    after_second, batches_scored, second = start("second")
    # A training batch, the held-out one for the cache, step 0 and its evaluation, and after step 1.
    assert (after_first, after_second, batches_scored) == (1, 1, 3)
    assert [line["split"] for line in second] == ["identity", "eval"]
    values = lambda logged: [{k: v for k, v in x.items() if k != "time"} for x in logged]
    assert values(first) == values(second)
    assert len(list(cache.glob("*.npy"))) == 1

    drawn = run.initial_params
    nudged = lambda setup: jax.tree.map(lambda x: 1.05 * x, drawn(setup))
    monkeypatch.setattr(run, "initial_params", nudged)
    assert start("other")[0] == 2
    assert len(list(cache.glob("*.npy"))) == 2
    ours, theirs = (jax.tree.map(np.asarray, list(examples)) for _, examples, _ in computed)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)  # on the same data


def test_programs_are_kept_in_the_folder_that_the_config_names_and_nowhere_else(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    make = lambda: jax.jit(lambda x: x @ x + 1)(np.eye(3, dtype=np.float32)).block_until_ready()
    with shared_programs(""):
        assert jax.config.jax_compilation_cache_dir == before
    with shared_programs(tmp_path / "compiled"):
        assert jax.config.jax_persistent_cache_min_compile_time_secs <= 0.05
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        make()
        programs = sorted(tmp_path.glob("compiled/*-cache"))
        jax.clear_caches()
        make()
    assert programs
    assert sorted(tmp_path.glob("compiled/*-cache")) == programs
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
def test_a_nan_loss_stops_the_run_names_the_rows_and_keeps_the_last_checkpoint(
    started, tmp_path, monkeypatch
):
    build = batches.train_batches

    def poisoned(examples, *args, attach, **kwargs):
        if attach is None:
            return build(examples, *args, attach=attach, **kwargs)

        def attach_nan(rows):
            rows = attach(rows)
            first = np.argwhere((rows.example == 7).any(-1))
            for place in first:
                rows.reference[tuple(place)] = np.nan
            return rows

        return build(examples, *args, attach=attach_nan, **kwargs)

    monkeypatch.setattr(batches, "train_batches", poisoned)
    with pytest.raises(NonFiniteLoss, match="loss or gradient is not finite") as error:
        started(**{"preference.epochs": 1, "preference.steps": 0, "checkpoint_every": 1})
    assert "reviews/train:8" in str(error.value)
    steps = [int(p.name) for p in (tmp_path / "run" / "preference" / "checkpoints").iterdir()]
    stopped = int(re.search(r"at step (\d+)", str(error.value))[1])
    assert max(steps) == stopped - 1
    assert all(np.isfinite(x).all() for x in saved_arrays(tmp_path / "run", step=max(steps)))


@pytest.mark.slow
def test_a_policy_that_is_not_its_reference_at_step_zero_is_refused(started, monkeypatch):
    original = preference.reference_weights

    def nudged(*args):
        weights = original(*args)
        return weights._replace(params=jax.tree.map(lambda x: 1.05 * x, weights.params))

    monkeypatch.setattr(preference, "reference_weights", nudged)
    with pytest.raises(ReferenceMismatch, match="at step 0 the policy is not the reference"):
        started(stages=("preference",))


def test_the_workdir_of_another_config_is_refused_before_anything_is_read(finished):
    with pytest.raises(ConfigError, match=r"preference\.beta: 0\.1 -> 0\.2"):
        run.run(tiny_config(**{"preference.beta": 0.2}), str(finished[0]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mesh.data": 16}, ConfigError, r"config\.mesh: .*needs 16 devices, but there are 8"),
        ({"mesh.data": 8, "micro_rows": 3}, ConfigError, "config.micro_rows: .*multiple of 8"),
        ({"tokens.max_length": 200}, ConfigError, "max_length = 200.*128 positions"),
        (
            {"preference.beta": 0.0},
            ConfigError,
            r"config\.preference\.beta: must be greater than 0, got 0\.0",
        ),
        ({"preference.data.source": "no/such/file.jsonl"}, DataError, "file.jsonl"),
        ({"model.path": "no/such/folder", "tokenizer": ""}, ConfigError, "no/such/folder"),
        ({"model.width": 15}, ConfigError, r"config\.model: .*width 15"),
        ({"row_length": 8}, DataError, "raise row_length"),
        ({"chat_template": "no/such.jinja"}, ConfigError, r"config\.chat_template"),
    ],
)
def test_a_run_that_cannot_work_leaves_nothing_but_tokens(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run.run(tiny_config(**changes), str(tmp_path / "run"))
    assert {path.name for path in tmp_path.glob("run/*")} <= {"tokens"}


@pytest.mark.slow
def test_the_command_line_tells_a_user_error_in_words(tmp_path):
    """An unknown key, and a value that cannot run: no traceback, nothing left behind."""
    for changes, message, status in (
        ({"preference.betta": 1}, "betta", 2),
        ({"preference.beta": -1}, "ConfigError: config.preference.beta", 1),
    ):
        done = train(tmp_path / "run", **changes)
        assert done.returncode == status
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_run_and_keeps_the_last_checkpoint(
    started, tmp_path, monkeypatch
):
    original = writing.require_space

    def full(folder, tree):
        if str(folder).endswith("preference/checkpoints") and int(tree.step) == 4:
            raise checkpoints.CheckpointError(f"{folder}: no space left")
        original(folder, tree)

    monkeypatch.setattr(writing, "require_space", full)
    with pytest.raises(checkpoints.CheckpointError, match="no space left"):
        started()
    steps = [int(p.name) for p in (tmp_path / "run" / "preference" / "checkpoints").iterdir()]
    assert steps == [2]


def test_a_stage_that_does_not_fit_is_refused_before_weights_are_made(tmp_path, monkeypatch):
    config = tiny_config(stages=("preference",))
    asked_for = lambda setup: pytest.fail("weights were made")
    monkeypatch.setattr(run, "initial_params", asked_for)
    monkeypatch.setattr(stage_module, "limit_bytes", lambda: 2**10)
    with pytest.raises(ConfigError, match=r"preference: a step needs about .* config\.\w+.* tries"):
        run.run(config, str(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokens"]


@pytest.mark.long
def test_a_profile_says_where_the_time_went_and_holds_a_trace(tmp_path, capsys):
    config = tiny_config(
        stages=("preference",), profile=True, **{"preference.steps": 8, "evaluate_every": 4}
    )
    run.run(config, str(tmp_path))
    printed, folder = capsys.readouterr().out, tmp_path / "preference"
    assert (folder / "profile.txt").read_text().strip() in printed
    assert re.search(
        r"preference: compiled in \d+ s; the step needs \d+ MiB on each device\s+\(\d+ MiB for arg",
        printed,
    )
    profile = json.loads((folder / "profile.json").read_text())
    names = {"compilation and first step", "waiting for data", "steps", "evaluation"}
    assert set(profile["spans"]) == names | {"waiting for checkpoints"}
    assert all(seconds > 0 for seconds in profile["spans"].values())
    whole = sum(profile["step"].values())
    assert 0 < profile["step"]["forward"] < whole
    assert 0 < profile["utilisation"] < 1
    assert list(folder.glob("trace/**/*.xplane.pb"))


@pytest.mark.slow
def test_a_learning_rate_that_changes_nothing_is_warned_of_once(tmp_path, capsys):
    config = tiny_config(
        stages=("preference",), **{"preference.learning_rate": 1e-14, "preference.steps": 3}
    )
    run.run(config, str(tmp_path))
    assert capsys.readouterr().out.count("smaller than the weights can resolve") == 1
