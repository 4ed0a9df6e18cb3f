"""The plan of a small config on CPU devices: what its programs need, and how often they run."""

import jax
import pytest

from dpojax.config.defaults import default_config
from dpojax.config.errors import ConfigError
from dpojax.planning.chips import topology
from dpojax.planning.expected import DRAWN, expected_data
from dpojax.planning.plan import (
    PlanRefused,
    StagePlan,
    compile_program,
    describe,
    make_plan,
    require_hours,
    unplanned,
)
from dpojax.planning.programs import plan_stage, programs
from dpojax.stages.train import abstract_rows


def small():
    config = default_config()
    config.stages = ("preference",)
    config.tokenizer = "train:300"
    config.model.update(width=16, layers=2, heads=2, kv_heads=2, mlp_width=32, max_positions=64)
    config.tokens.max_length = 48
    config.max_buckets = 1
    config.mesh.update(data=2, fsdp=2)
    config.preference.batch_size = 8
    config.plan.update(examples=80, prompt=10.0, response=6.0)
    return config


@pytest.fixture(scope="module")
def planned():
    return plan_stage(small(), "preference", topology("cpu:4"))


def test_a_stage_that_samples_is_left_out_of_the_plan_and_named():
    config = small()
    config.stages = ("ppo",)
    assert [*make_plan(config, topology("cpu:4"))] == []
    assert unplanned(config) == ["ppo"]


def test_an_epoch_of_the_expected_examples_is_as_many_steps(planned):
    assert planned.steps == 80 // 8


def test_expected_lengths_have_the_means_that_the_config_expects():
    config = small()
    config.tokens.max_length = 10_000
    config.plan.update(examples=10**6, prompt=200.0, response=50.0)
    data = expected_data(config, responses=2)
    prompts = [len(example.prompt) for example in data.examples]
    answers = [len(r) for example in data.examples for r in example.responses]
    # A log-normal of spread 0.6 has a coefficient of variation of 0.66.
    assert sum(prompts) / len(prompts) == pytest.approx(200, rel=4 * 0.66 / DRAWN**0.5)
    assert sum(answers) / len(answers) == pytest.approx(50, rel=4 * 0.66 / (2 * DRAWN) ** 0.5)


def test_no_expected_example_is_longer_than_the_config_allows():
    config = small()
    config.plan.update(examples=100, prompt=40.0, response=40.0)
    for example in expected_data(config, responses=2).examples:
        assert all(len(example.prompt) + len(r) <= 48 for r in example.responses)


def test_a_config_that_expects_nothing_is_told_what_to_say():
    config = small()
    config.plan.examples = 0
    with pytest.raises(ConfigError, match=r"config\.plan\.examples, prompt and response"):
        plan_stage(config, "preference", topology("cpu:4"))


@pytest.mark.slow
def test_the_arguments_of_the_step_are_weights_moments_and_rows(planned):
    """They lie on 2 of 4 devices each, since data is 2 and fsdp is 2."""
    step = programs(planned)[0]
    compiled = compile_program(step, topology("cpu:4"))
    state = step.footprint.weights + step.footprint.optimizer
    rows = abstract_rows(planned.stage, planned.stage.batches.shape)
    of_rows = sum(x.nbytes for x in jax.tree.leaves(rows)) / 4
    assert compiled.memory.arguments == pytest.approx(state + of_rows, rel=0.02)
    assert compiled.roofline is None  # a host's CPUs have no row in the table of peaks


def test_a_cached_reference_scores_every_example_once_and_a_live_one_every_batch():
    for kind, runs in (("cached", 80 / 8), ("live", 3 * 80 / 8)):
        config = small()
        config.preference.epochs = 3
        config.preference.reference.kind = kind
        planned = plan_stage(config, "preference", topology("cpu:4"))
        named = {one.name: one for one in programs(planned)}
        assert named["reference"].runs == runs
        assert named["step"].runs == 30


def test_members_of_a_sweep_do_the_work_of_as_many_steps(planned):
    step, members = programs(planned, members=2)[:2]
    assert members.work.model_flops == 2 * step.work.model_flops
    assert "2 members" in members.name


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("INTERNAL: a bug\nof XLA", "sampler: THE COMPILER FAILS: INTERNAL: a bug of XLA"),
        ("RESOURCE_EXHAUSTED: it is full. Used 3G of 1G", "sampler: DOES NOT FIT: Used 3G of 1G"),
    ],
)
def test_what_the_compiler_fails_at_is_told_in_its_words_and_does_not_fit(planned, error, line):
    def lower():
        raise jax.errors.JaxRuntimeError(error)

    chips = topology("cpu:4")
    program = programs(planned)[0]._replace(name="sampler", lower=lower)
    plan = StagePlan("preference", chips, planned, [compile_program(program, chips)])
    assert not plan.fits
    assert [text.strip() for text in describe(plan)][1] == line


@pytest.mark.parametrize("members", [2, 4])
def test_a_place_of_a_sweep_holds_its_members_and_their_share_of_the_rows(planned, members):
    """Two places of two devices: half of the devices share a batch's rows, for each member."""
    alone, together = (one.footprint for one in programs(planned, members=members)[:2])
    each = members // 2
    assert (together.weights, together.optimizer) == (each * alone.weights, each * alone.optimizer)
    assert together.activations == 2 * each * alone.activations


@pytest.mark.long
def test_members_on_one_device_keep_no_old_weights_beside_the_new_ones():
    """A choice after the step, between the old states and the new ones, needs both."""
    config = small()
    config.model.update(width=256, layers=4, mlp_width=1024)
    config.mesh.update(data=1, fsdp=1)
    chips = topology("cpu:1")
    step, members = programs(plan_stage(config, "preference", chips), members=2)[:2]
    alone, together = (compile_program(one, chips).memory for one in (step, members))
    # With 256 wide layers, two members need 1.0 times their weights more than two single steps,
    # and 1.9 times with such a choice.
    assert together.temporary - 2 * alone.temporary < 1.5 * members.footprint.weights
    assert members.footprint.total == pytest.approx(together.total, rel=0.15)


@pytest.mark.slow
def test_the_plan_of_a_sweep_says_that_no_collective_crosses_members():
    config = small()
    config.mesh.update(data=4, fsdp=2)
    config.preference.batch_size, config.micro_rows = 64, 8
    planned = plan_stage(config, "preference", topology("cpu:8"))
    # The loop over micro-batches runs as often as the data say: no member is asked.
    assert planned.stage.batches.shape.micro_batches > 1
    step = programs(planned, members=4)[1]
    assert step.name == "step of 4 members, each on 2 device(s)"
    compiled = compile_program(step, topology("cpu:8"))
    assert compiled.crossing == ()
    everywhere = compile_program(step._replace(member_devices=1), topology("cpu:8"))
    assert everywhere.crossing  # two devices of a member do exchange data


def test_a_plan_that_takes_too_long_is_refused():
    class Long:
        hours = 3.0

    require_hours([Long()], most=3.5)
    with pytest.raises(PlanRefused, match=r"6\.00 h .* --max_hours=5"):
        require_hours([Long(), Long()], most=5)
