"""A DPO train step compiled for TPUs that are not there: its memory with splash and with XLA.

    pip install 'jax[tpu]'
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu_attention.py

Compiles the step of a run (Llama shape, bfloat16 products, remat dots, fsdp over all chips, one row
a chip) ahead of time, and prints what the compiler says that a chip needs beside weights, moments
and data. Half a minute for each program on two cores.
"""

from __future__ import annotations

import argparse
import pathlib
import time
import types
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dpojax import sharding
from dpojax.data.rows import Shape
from dpojax.launch import setup, stages, train
from dpojax.launch.defaults import default_config
from dpojax.training.memory import gib

MODEL = {"width": 1024, "layers": 12, "heads": 16, "kv_heads": 8, "mlp_width": 2816}
VOCABULARY = 32_000
EXAMPLE = 512  # columns of a prompt and its two responses, half of them scored


class Needs(NamedTuple):
    """What the compiler says of a step, for one chip."""

    temporary: int  # bytes, beside arguments and results
    flops: float
    seconds: float  # to compile


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--attention", nargs="+", default=["xla", "splash"])
    parser.add_argument("--remat", default="dots")
    args = parser.parse_args(argv)
    chips = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    print(f"{args.topology}, {len(chips)} x {chips[0].device_kind}, jax {jax.__version__}")
    print(f"{'attention':>10}{'tokens a row':>14}{'temporary':>12}{'compile s':>11}")
    for length in args.lengths:
        for attention in args.attention:
            try:
                needs = compile_step(chips, attention, length, args.remat)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                found = str(error).split("Used ")[-1].split(".  ")[0][:40]
                print(f"{attention:>10}{length:>14,}  does not fit: {found}", flush=True)
                continue
            row = f"{attention:>10}{length:>14,}{gib(needs.temporary):>12}{needs.seconds:>11.0f}"
            print(row, flush=True)


def compile_step(chips, attention: str, length: int, remat: str = "dots") -> Needs:
    """The step of `config.dpo` for one row of `length` tokens on each chip."""
    config = default_config()
    config.model.update(MODEL, max_positions=length)
    config.model.update(attention=attention, compute_dtype="bfloat16", remat=remat)
    mesh = sharding.make_mesh(data=1, fsdp=len(chips), devices=chips)
    model, raw = setup.open_model(config, VOCABULARY, mesh)
    tokenizer = types.SimpleNamespace(eos_token_id=0)
    lora = dict.fromkeys(("sft", "dpo", "reward", "classifier"))
    own = setup.Setup(config, pathlib.Path("nowhere"), mesh, tokenizer, model, raw, lora)
    shape = Shape(1, len(chips), length, length // 2, max(1, length // EXAMPLE), 2)
    stage = stages.without_data("dpo", own)._replace(shape=shape, steps=1)
    began = time.perf_counter()
    compiled = train.lower(stage).compile()
    seconds = time.perf_counter() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Needs(int(memory.temp_size_in_bytes), cost["flops"], seconds)


if __name__ == "__main__":
    main()
