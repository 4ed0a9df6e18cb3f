"""Programs compiled for TPUs that are not there: their memory with splash and with XLA's attention.

    pip install 'jax[tpu]'
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu_attention.py

Compiles ahead of time the gradient of one layer's attention, and the whole DPO step of a run (Llama
shape, bfloat16 products, remat dots, fsdp over all chips, one row a chip), and prints what the
compiler says that a chip needs beside arguments and results. A minute or two for each step.
"""

from __future__ import annotations

import argparse
import re
import time
import types
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from dpojax import sharding
from dpojax.config.defaults import default_config
from dpojax.data.packing import Shape
from dpojax.models.attention import PlainRows
from dpojax.models.kernels import KERNELS
from dpojax.stages import registry, train
from dpojax.stages.setup import Setup, open_model
from dpojax.training.memory import gib, temporary_bytes

MODEL = {"width": 1024, "layers": 12, "heads": 16, "kv_heads": 8, "mlp_width": 2816}
VOCABULARY = 32_000
EXAMPLE = 512  # columns of a prompt and its two responses, half of them scored


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--attention", nargs="+", default=["xla", "splash"])
    parser.add_argument("--layer", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--step", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--remat", default="dots")
    args = parser.parse_args(argv)
    chips = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    print(f"{args.topology}, {len(chips)} x {chips[0].device_kind}, jax {jax.__version__}")
    print(f"{'program':>10}{'attention':>11}{'tokens a row':>14}{'temporary':>12}{'compile s':>11}")
    step = partial(lower_step, remat=args.remat)
    programs = [("layer", args.layer, lower_layer), ("step", args.step, step)]
    for name, lengths, lower in programs:
        for length in lengths:
            for attention in args.attention:
                cells = _compiled(partial(lower, chips, attention, length))
                print(f"{name:>10}{attention:>11}{length:>14,}{cells}", flush=True)


def _compiled(lower: Callable[[], jax.stages.Lowered]) -> str:
    began = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return f"  does not fit: needs {re.search('[0-9.]+[MG]', str(error))[0]}"
    return f"{gib(temporary_bytes(compiled)):>12}{time.perf_counter() - began:>11.0f}"


def lower_layer(chips, attention: str, length: int) -> jax.stages.Lowered:
    """The gradient of one layer's attention by its queries, keys and values."""
    kernel, dim = KERNELS[attention], MODEL["width"] // MODEL["heads"]
    mesh = sharding.make_mesh(data=1, fsdp=len(chips), devices=chips)
    by_row = NamedSharding(mesh, PartitionSpec(sharding.ROWS))

    def array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(chips), length, *shape), dtype, sharding=by_row)

    query = array(jnp.bfloat16, MODEL["heads"], dim)
    key = array(jnp.bfloat16, MODEL["kv_heads"], dim)

    def loss(query, key, value, rows):
        mixed = kernel.attend(query, key, value, kernel.mask(rows, None), dim**-0.5)
        return mixed.astype(jnp.float32).sum()

    rows = PlainRows(*[array(jnp.int32)] * 4)
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, key, rows)


def lower_step(chips, attention: str, length: int, remat: str) -> jax.stages.Lowered:
    """The DPO step with a cached reference, for one row of `length` tokens a chip."""
    config = default_config()
    config.stages = ("preference",)
    config.model.update(MODEL, max_positions=length)
    config.model.update(attention=attention, compute_dtype="bfloat16", remat=remat)
    run = registry.resolve(config, "nowhere")  # nothing is written
    mesh = sharding.make_mesh(data=1, fsdp=len(chips), devices=chips)
    model, _ = open_model(run.config, VOCABULARY, mesh)
    tokenizer = types.SimpleNamespace(eos_token_id=0)
    setup = Setup(run, mesh, tokenizer, model, imported_config=None)
    stage = registry.open_stage(setup, "preference")
    shape = Shape(1, len(chips), length, length // 2, max(1, length // EXAMPLE), 2)
    return train.lower_step(stage, shape)


if __name__ == "__main__":
    main()
