"""Predicted memory of TPUs against what XLA's compiler said of the shipped configs.

The compiler's numbers are those of benchmarks/plans, which benchmarks/plans.py has made.
"""

import json
import pathlib

import jax
import optax
import pytest
from jax.sharding import AbstractMesh

from dpojax.data.packing import Shape
from dpojax.models import decoder
from dpojax.models.published import published_config
from dpojax.models.splash import SPLASH
from dpojax.training import memory
from dpojax.training.state import abstract_state

PLANS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks/plans"
MEDIUM, PYTHIA = "openai-community/gpt2-medium", "EleutherAI/pythia-2.8b"


@pytest.fixture(autouse=True)
def tpus(monkeypatch):
    monkeypatch.setattr(memory, "_platform", lambda mesh: "tpu")


def compiled(file: str, stage: str, program: str = "step") -> dict[str, int]:
    """The compiler's bytes of a program, by kind."""
    stages = json.loads((PLANS / f"{file}.json").read_text())
    (found,) = [one for one in stages if one["stage"] == stage]
    (sizes,) = [one["memory"] for one in found["programs"] if one["name"] == program]
    return sizes


def abstract(name: str, optimizer, mesh: AbstractMesh):
    config = published_config(name)
    params = jax.eval_shape(decoder.build(config).init, jax.random.key(0))
    return config, abstract_state(params, optimizer, mesh, decoder.SHARDING_RULES)


def mesh_of(data: int, fsdp: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, 1), ("data", "fsdp", "tensor"))


def mib(size: float) -> float:
    return size / 2**20


def test_arrays_lie_in_tiles_of_8_x_128_numbers_in_the_order_that_pads_the_least():
    assert memory.tiled_bytes((16, 256), 4) == 4 * 16 * 256
    # 80 numbers take 128 places, or 160 take 256; 32 would take 128 as well, four times as many.
    assert memory.tiled_bytes((160, 32, 80), 4) == 4 * 160 * 32 * 128
    assert memory.tiled_bytes((8, 1), 4) == 4 * 8 * 128
    assert memory.tiled_bytes((0, 128), 4) == 0
    assert memory.tiled_bytes((3,), 4) == 12


@pytest.mark.parametrize(
    ("name", "fsdp", "file", "stage"),
    [(PYTHIA, 16, "hh-v5e_4x4", "sft"), (MEDIUM, 1, "instructions-v6e_1x1", "preference")],
)
def test_weights_take_as_much_as_the_arguments_of_an_evaluation(name, fsdp, file, stage):
    """Besides the weights they are rows, of less than 1 MiB. Unpadded, Pythia's shards would have
    666 MiB."""
    _, state = abstract(name, optax.sgd(1.0), mesh_of(1, fsdp))
    arguments = compiled(file, stage, "evaluation")["arguments"]
    assert mib(memory.bytes_per_device(state.params)) == pytest.approx(mib(arguments), abs=1)


@pytest.mark.parametrize(
    ("name", "axes", "shape", "file", "stage"),
    [
        (MEDIUM, (1, 1), (2, 2, 640, 360), "instructions-v6e_1x1", "preference"),
        (PYTHIA, (1, 16), (2, 16, 512, 376), "hh-v5e_4x4", "sft"),
    ],
)
def test_a_step_with_several_micro_batches_is_predicted_within_15_percent(
    name, axes, shape, file, stage
):
    is_medium = name == MEDIUM
    optimizer = optax.scale_by_adam() if is_medium else optax.scale_by_rms()
    config, state = abstract(name, optimizer, mesh := mesh_of(*axes))
    predicted = memory.predict(
        config,
        Shape(*shape, 8, 2),
        mesh,
        state=state,
        remat="dots" if is_medium else "full",
        kernel=SPLASH,
        max_logits=2**25 * mesh.size,
    )
    real = sum(compiled(file, stage).values())
    assert 0.85 < predicted.total / real < 1.15


def test_kernels_of_layers_are_rounded_to_bfloat16_before_an_evaluation_in_float32():
    """Nothing else of GPT-2 medium is large while its layers run on 2 x 384 tokens."""
    config = published_config(MEDIUM)
    temporary = compiled("instructions-v6e_1x1", "sft", "evaluation")["temporary"]
    rounded = memory._rounded(config, mesh_of(1, 1), "float32")
    assert mib(rounded) == pytest.approx(mib(temporary), rel=0.01)
    assert memory._rounded(config, mesh_of(1, 1), "bfloat16") == 0
