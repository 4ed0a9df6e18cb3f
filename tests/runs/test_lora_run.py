"""Stages that train LoRA adapters: what is trained, kept, resumed and exported."""

import dataclasses
import pathlib
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.experimental.compilation_cache import compilation_cache

from dpojax.config.errors import ConfigError
from dpojax.config.resolved import editable
from dpojax.config.saved import write_or_compare_config
from dpojax.data import reviews
from dpojax.models import decoder, huggingface
from dpojax.models.attention import plain_rows
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.lora import LORA_RULES
from dpojax.runs import run
from dpojax.runs.export import export
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import initial_params, prepare_setup
from dpojax.stages.train import evaluate_batches
from dpojax.training import checkpoints
from dpojax.training.preemption import Preempted, StopSignal
from dpojax.training.state import abstract_state, make_optimizer

from .conftest import lines, tiny_config

DEVICES = 8

# peft reads a name of transformers' that has since been deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RANK, ALPHA = 2, 6.0
LORA = {
    "stages": ("preference",),
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "model.remat": "none",
    "preference.lora.rank": RANK,
    "preference.lora.alpha": ALPHA,
    "preference.learning_rate": 0.02,
    "preference.warmup_steps": 0,
    "preference.data.limit": 16,
}
TOKENS = np.random.default_rng(1).integers(5, 300, (2, 11)).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs that are resumed find their programs compiled."""
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    compilation_cache.reset_cache()
    compilation_cache.set_cache_dir(str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A base model with random weights, as a Hugging Face folder."""
    folder, rng = tmp_path_factory.mktemp("base") / "model", np.random.default_rng(0)
    shape = dict(width=16, layers=2, heads=2, mlp_width=16, max_positions=128)
    tokenizer = reviews.tokenizer()
    config = DecoderConfig(**LLAMA, **shape, vocab_size=len(tokenizer))
    shapes = jax.eval_shape(decoder.build(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.float32(0.3 * rng.standard_normal(x.shape)), shapes)
    huggingface.save(folder, config, params, tokenizer=tokenizer)
    return str(folder)


def prepared(model_folder, folder, name="preference", **changes):
    """A stage and what it starts from, in a workdir with its config."""
    config = tiny_config(**LORA | {"model.path": model_folder, "stages": (name,)} | changes)
    run = resolve(config, folder)
    stage = open_stage(prepare_setup(run), name).prepare()
    write_or_compare_config(run)
    return stage


def moved(stage, folder, **changes):
    """The same stage and its compiled programs in another workdir."""
    config = editable(stage.setup.config)
    config.update_from_flattened_dict(changes)
    opened = open_stage(prepare_setup(resolve(config, folder)), stage.name)
    return dataclasses.replace(opened, programs=stage.programs, batches=stage.batches)


def trained(stage, start, stop_at=None):
    """The parameters that training gives; `stop_at` asks it to stop there."""
    with jax.set_mesh(stage.setup.mesh), StopSignal() as stop:
        if stop_at:
            stop.agreed = lambda step=0: step == stop_at
        return stage.train(start, stop)


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """A DPO stage of adapters that nothing disturbed; `start` are the weights that it was given."""
    stage = prepared(model_folder, tmp_path_factory.mktemp("lora") / "run")
    start = initial_params(stage.setup)
    params = trained(stage, lambda: start)
    return SimpleNamespace(stage=stage, folder=stage.setup.workdir, start=start, params=params)


def saved_state(stage, step=6):
    optimizer = make_optimizer(stage.config.optimizer)
    abstract = abstract_state(stage.adapters.abstract, optimizer, stage.setup.mesh, LORA_RULES)
    with checkpoints.Checkpoints(stage.folder / "checkpoints") as saved:
        return saved.restore(abstract, step=step)[0]


def base_on_disk(stage):
    return checkpoints.load_tree(stage.adapters.base_folder, stage.adapters.abstract_base)


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def merged_in_numpy(base, adapters):
    """base + alpha / rank * a @ b, layer by layer."""
    merged, adapters = flat(base), flat(adapters)
    for path in [path.removesuffix("/a") for path in adapters if path.endswith("/a")]:
        a, b = adapters[f"{path}/a"], adapters[f"{path}/b"]
        delta = np.stack([ALPHA / RANK * (x @ y) for x, y in zip(a, b)])
        merged[path] = merged[path] + delta.reshape(merged[path].shape)
    return merged


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_allclose(value, theirs[path], err_msg=path, **tolerance)


EXACTLY = {"rtol": 0, "atol": 0}


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapters_and_their_moments_alone(finished):
    state = saved_state(finished.stage)
    adapters = flat(state.params)
    assert {path.rsplit("/", 1)[-1] for path in adapters} == {"a", "b"}
    count = sum(x.size for x in adapters.values())
    assert count < 0.25 * sum(x.size for x in jax.tree.leaves(finished.start))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) <= 2 * count + 2
    assert all(np.abs(x).max() > 0 for x in adapters.values())


@pytest.mark.slow
def test_adapters_and_base_lie_over_the_mesh(finished):
    adapters = saved_state(finished.stage).params["blocks"]["mlp"]["up"]["kernel"]
    merged = finished.params["blocks"]["mlp"]["up"]["kernel"]
    parts = lambda x: [
        whole // part for whole, part in zip(x.shape, x.addressable_shards[0].data.shape)
    ]
    assert parts(merged) == [1, 2, 2]  # layers, inward, outward
    assert parts(adapters["a"]) == [1, 2, 1]
    assert parts(adapters["b"]) == [1, 1, 2]


@pytest.mark.slow
def test_the_base_is_the_reference_and_stays_as_it_was_in_memory_and_on_disk(
    finished, model_folder
):
    _, base_params, _ = huggingface.load(model_folder)
    assert finished.stage.adapters.base_folder == finished.folder / "preference" / "reference"
    assert_same(flat(base_on_disk(finished.stage)), flat(base_params), **EXACTLY)
    assert_same(flat(finished.start), flat(base_params), **EXACTLY)


@pytest.mark.slow
def test_new_adapters_change_nothing_at_all(finished):
    identity, first = lines(finished.folder, "preference")[:2]
    assert identity["drift/reference_identity"] == 0
    np.testing.assert_allclose(identity["loss"], np.log(2), rtol=1e-6)
    assert (first["rewards/margins"], first["kl/per_token"], first["displacement"]) == (0, 0, 0)


@pytest.mark.slow
def test_the_loss_of_a_stage_with_adapters_falls(finished):
    losses = [
        line["loss"] for line in lines(finished.folder, "preference") if line["split"] == "train"
    ]
    assert losses[0] == pytest.approx(np.log(2), rel=1e-6)
    assert losses[-1] < 0.65


@pytest.mark.slow
def test_what_a_stage_returns_is_the_base_plus_the_product_of_the_adapters(finished):
    expected = merged_in_numpy(finished.start, saved_state(finished.stage).params)
    assert_same(flat(finished.params), expected, rtol=1e-6, atol=1e-7)
    again = open_stage(finished.stage.setup, "preference").trained_params()
    assert_same(flat(again), flat(finished.params), **EXACTLY)


@pytest.mark.slow
def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(finished, tmp_path):
    stage = moved(finished.stage, tmp_path / "run")
    with pytest.raises(Preempted, match="stopped at step 3 of 6, saved"):
        trained(stage, partial(initial_params, stage.setup), stop_at=3)
    trained(stage, lambda: pytest.fail("a resumed stage reads its base from the workdir"))
    for ours, theirs in zip(
        jax.tree.leaves(saved_state(stage)), jax.tree.leaves(saved_state(finished.stage))
    ):
        np.testing.assert_array_equal(ours, theirs)
    values = lambda folder: [
        {
            k: v
            for k, v in line.items()
            if not k.startswith(("time", "perf/", "goodput/", "memory/"))
        }
        for line in lines(folder, "preference")
    ]
    assert values(tmp_path / "run") == values(finished.folder)


def damage(folder):
    """Flip a bit in the middle of the largest file below a folder."""
    files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


@pytest.mark.long
def test_a_damaged_base_is_made_again_of_the_weights_it_came_from_and_of_no_others(
    finished, tmp_path, caplog
):
    stage = moved(finished.stage, tmp_path / "run")
    with pytest.raises(Preempted):
        trained(stage, partial(initial_params, stage.setup), stop_at=3)
    damage(stage.adapters.base_folder)
    others = lambda: jax.tree.map(lambda x: x + 1, initial_params(stage.setup))
    with pytest.raises(checkpoints.CheckpointError, match="reference/0 is damaged"):
        trained(stage, others)
    assert not caplog.records
    trained(stage, partial(initial_params, stage.setup))
    assert "reference was damaged: its weights are made again" in caplog.text
    assert_same(flat(base_on_disk(stage)), flat(finished.start), **EXACTLY)
    assert_same(flat(stage.trained_params()), flat(finished.params), **EXACTLY)


@pytest.mark.long
def test_a_live_reference_is_the_base_itself_and_gives_the_numbers_of_the_cached_one(
    finished, tmp_path
):
    """On the trained policy, by which the two differ."""
    stage = moved(finished.stage, tmp_path / "run", **{"preference.reference.kind": "live"})
    with jax.set_mesh(stage.setup.mesh), StopSignal() as stop, ExitStack() as writing:
        used = stage.open_reference(None, finished.start, stop, writing)
        batches = (used.to_device(rows, stage.setup.mesh) for rows in stage.batches.held_out())
        live = evaluate_batches(stage, finished.params, batches)
    cached = [line for line in lines(finished.folder, "preference") if line["split"] == "eval"][-1]
    assert cached["step"] == 6
    assert abs(live["rewards/margins"]) > 0.01
    for name, value in live.items():
        np.testing.assert_allclose(value, cached[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert not (tmp_path / "run").exists()  # no weights are kept a second time


@pytest.mark.long
def test_a_base_in_bfloat16_is_the_reference_of_its_adapters_also_for_kl(model_folder, tmp_path):
    """TDPO compares whole distributions, in the step, with the base."""
    changes = {
        "preference.loss": "tdpo",
        "preference.reference.kind": "live",
        "preference.steps": 1,
    }
    changes |= {"preference.lora.base_dtype": "bfloat16"}
    stage = prepared(model_folder, tmp_path / "run", **changes)
    trained(stage, partial(initial_params, stage.setup))
    identity, at_zero = lines(tmp_path / "run", "preference")[:2]
    assert identity["drift/reference_identity"] <= 1e-6
    np.testing.assert_allclose([identity["loss"], at_zero["loss"]], np.log(2), rtol=1e-6)
    base = base_on_disk(stage)
    _, base_params, _ = huggingface.load(model_folder)
    rounded = jax.tree.map(lambda x: x.astype("bfloat16"), base_params)
    assert {x.dtype for x in jax.tree.leaves(base)} == {np.dtype("bfloat16")}
    assert_same(flat(base), flat(rounded), **EXACTLY)
    with StopSignal() as stop, ExitStack() as writing:
        assert stage.open_reference(None, base, stop, writing).params is base


@pytest.mark.long
def test_an_sft_stage_keeps_its_base_resumes_from_it_and_hands_on_merged_weights(
    model_folder, tmp_path
):
    changes = {"sft.lora.rank": RANK, "sft.lora.alpha": ALPHA, "sft.steps": 2}
    changes |= {"sft.data.limit": 16, "preference.lora.rank": 0}
    stage = prepared(model_folder, tmp_path / "run", "sft", **changes)
    start = initial_params(stage.setup)
    with pytest.raises(Preempted):
        trained(stage, lambda: start, stop_at=1)
    params = trained(stage, lambda: pytest.fail("its base is in sft/base"))
    assert stage.adapters.base_folder == tmp_path / "run" / "sft" / "base"
    expected = merged_in_numpy(start, saved_state(stage, step=2).params)
    assert_same(flat(params), expected, rtol=1e-6, atol=1e-7)
    assert any(np.abs(expected[path] - x).max() > 0 for path, x in flat(start).items())


@pytest.mark.slow
def test_an_exported_model_holds_the_merged_weights(finished, tmp_path):
    folder = export(str(finished.folder), str(tmp_path / "merged"), step=4)
    _, params, _ = huggingface.load(folder)
    expected = merged_in_numpy(finished.start, saved_state(finished.stage, step=4).params)
    assert_same(flat(params), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_exported_adapters_give_the_merged_models_logits_in_peft(finished, model_folder, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers builds its models with torch")
    peft = pytest.importorskip("peft", reason="the adapters are applied by peft")
    from transformers import AutoModelForCausalLM

    merged = export(str(finished.folder), str(tmp_path / "merged"))
    alone = export(str(finished.folder), str(tmp_path / "adapters"), adapters=True)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor(TOKENS, dtype=torch.int64)
    with torch.no_grad():
        without = base(ids).logits.numpy()
        whole = AutoModelForCausalLM.from_pretrained(merged)(ids).logits.numpy()
        model = peft.AutoPeftModelForCausalLM.from_pretrained(alone)  # finds the base by its name
        adapted = model(ids).logits.numpy()
    ours = decoder.logits(finished.stage.setup.model, finished.params, plain_rows(TOKENS))
    np.testing.assert_allclose(adapted, whole, atol=1e-4)
    np.testing.assert_allclose(ours, whole, atol=1e-4)
    assert np.abs(without - whole).max() > 0.01


@pytest.mark.slow
def test_a_stage_starts_from_the_adapters_of_a_folder_of_pefts(finished, tmp_path):
    folder = export(str(finished.folder), str(tmp_path / "adapters"), adapters=True)
    stage = moved(finished.stage, tmp_path / "run", **{"preference.lora.adapters": str(folder)})
    assert_same(flat(stage.adapters.start(0)), flat(saved_state(finished.stage).params), **EXACTLY)
    assert finished.stage.starts_at_reference
    assert not stage.starts_at_reference
    message = r"config\.preference\.lora\.alpha = 5\.0, but the adapters in .* have 6\.0"
    with pytest.raises(ConfigError, match=message):
        moved(stage, tmp_path / "run", **{"preference.lora.alpha": 5.0})


def test_a_stage_without_adapters_has_none_to_export(tmp_path):
    write_or_compare_config(resolve(tiny_config(), tmp_path / "run"))
    with pytest.raises(
        ConfigError, match=r"stage preference trained all weights .*without --adapters"
    ):
        export(str(tmp_path / "run"), str(tmp_path / "out"), adapters=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preference.lora.targets": ("mlp/", "attn/")},
            r"config\.preference\.lora: targets: 'attn/' is found",
        ),
        (
            {"preference.lora.adapters": "no/such"},
            r"config\.preference\.lora\.adapters: .*/no/such/.*not there",
        ),
    ],
)
def test_adapters_that_fit_no_kernel_are_refused_before_data_are_read(tmp_path, changes, message):
    changes = {"preference.lora.rank": 2, "sft.data.source": "no/such/file.jsonl"} | changes
    with pytest.raises(ConfigError, match=message):
        run.run(tiny_config(**changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
