"""Log-probs of tokens: time and memory of this library's path against the usual ones.

    python benchmarks/losses.py
    JAX_PLATFORMS=cpu python benchmarks/losses.py --topology h200:1    # pip install 'jax[cuda13]'
    JAX_PLATFORMS=cpu python benchmarks/losses.py --topology v5e:2x2   # pip install 'jax[tpu]'

Each system computes log p(target) of every token from hidden states and a head, and the gradients
of their sum with respect to both:

    dpojax    token_logprobs, with its default number of logits
    optax     softmax_cross_entropy_with_integer_labels of all logits
    tokamax   linear_softmax_cross_entropy_loss, where it is installed and runs on the device

Without --topology, programs run on this machine's first device: the systems take turns, and each
cell is the median of the rounds. Memory is what the compiler allots to temporary arrays. With
--topology nothing runs, and memory alone is shown.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpojax.head import Head
from dpojax.logprobs import token_logprobs
from dpojax.planning.chips import topology
from dpojax.tables import text_table

SHAPES = {"V 32k": (32_000, 2_048), "V 150k": (151_936, 2_048)}  # vocabulary, width on accelerators
CPU_WIDTH = 256


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="", help="compile for these chips; run nothing")
    parser.add_argument("--tokens", type=int, default=0, help="0: 1024 on a CPU, 8192 elsewhere")
    parser.add_argument("--dtype", default="", help="of hidden states and products")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    device = topology(args.topology).devices[0] if args.topology else jax.devices()[0]
    on_cpu = device.platform == "cpu"
    tokens = args.tokens or (1024 if on_cpu else 8192)
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    print(
        f"{args.topology or device.device_kind}, jax {jax.__version__}, {tokens:,} tokens, {dtype}"
    )
    results, functions = [], systems()
    for name, (vocabulary, width) in SHAPES.items():
        width = CPU_WIDTH if on_cpu else width
        programs = {
            system: compiled(function, device, (tokens, width, vocabulary), dtype)
            for system, function in functions.items()
        }
        seconds = {} if args.topology else in_turns(programs, args.rounds)
        for system, program in programs.items():
            results.append(
                {"case": f"{name}, D {width}", "system": system, "seconds": seconds.get(system)}
                | ({"problem": program} if isinstance(program, str) else memory(program))
            )
    print("\n".join(text_table(table(results), left=(0, 1))))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def systems() -> dict[str, Callable]:
    """Name -> (hidden [T, D], weight [V, D], targets [T]) -> the sum of negative log-probs."""
    found: dict[str, Callable] = {"dpojax": of_dpojax, "optax": of_optax}
    try:
        import tokamax
    except ImportError:
        print("tokamax is not installed")
        return found
    flags.FLAGS(sys.argv[:1])  # tokamax reads its own flags, and refuses those of this command
    return found | {"tokamax": partial(of_tokamax, tokamax)}


def of_dpojax(hidden: Array, weight: Array, targets: Array) -> Array:
    return -token_logprobs(hidden, Head(weight), targets).sum()


def of_optax(hidden: Array, weight: Array, targets: Array) -> Array:
    logits = (hidden @ weight.T.astype(hidden.dtype)).astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets).sum()


def of_tokamax(tokamax: Any, hidden: Array, weight: Array, targets: Array) -> Array:
    weight = weight.T.astype(hidden.dtype)
    return tokamax.linear_softmax_cross_entropy_loss(hidden, targets, weight, reduction="sum")


def compiled(
    function: Callable, device: jax.Device, shape: tuple[int, int, int], dtype: str
) -> jax.stages.Compiled | str:
    """The program of loss and gradients on a device, or why there is none."""
    tokens, width, vocabulary = shape
    place = NamedSharding(Mesh([device], ("data",)), PartitionSpec())
    arrays = (
        jax.ShapeDtypeStruct((tokens, width), dtype, sharding=place),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32, sharding=place),
        jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=place),
    )
    try:
        with jax.set_mesh(place.mesh):
            return jax.jit(jax.value_and_grad(function, (0, 1))).lower(*arrays).compile()
    except Exception as error:  # another library's: whatever it raises is its answer
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


def memory(program: jax.stages.Compiled) -> dict[str, int]:
    return {"temporary_bytes": int(program.memory_analysis().temp_size_in_bytes)}


def in_turns(programs: dict[str, Any], rounds: int) -> dict[str, float]:
    """The median seconds of each program; the systems take turns, one run each."""
    ready = {name: one for name, one in programs.items() if not isinstance(one, str)}
    arguments = {name: random_arguments(one) for name, one in ready.items()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds + 1):
        for name, program in ready.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments[name]))
            if turn:  # the first one warms caches up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def random_arguments(program: jax.stages.Compiled) -> list[Array]:
    hidden, weight, targets = jax.tree.leaves(program.args_info)
    keys = jax.random.split(jax.random.key(0), 3)
    numbers = [
        jax.random.normal(keys[0], hidden.shape, hidden.dtype),
        0.02 * jax.random.normal(keys[1], weight.shape, weight.dtype),
        jax.random.randint(keys[2], targets.shape, 0, weight.shape[0]),
    ]
    shardings = jax.tree.leaves(program.input_shardings[0])
    return [jax.device_put(x, place) for x, place in zip(numbers, shardings)]


def table(results: list[dict]) -> list[list[str]]:
    """The heading, and a row for each result; ratios are to the line of optax."""
    optax_of = {one["case"]: one for one in results if one["system"] == "optax"}
    rows = [["case", "system", "temporary, MiB", "to optax", "ms", "to optax"]]
    for one in results:
        cells = [one["case"], one["system"]]
        if "problem" in one:
            rows.append([*cells, one["problem"], "", "", ""])
            continue
        usual = optax_of[one["case"]]
        mib, of_usual = one["temporary_bytes"] / 2**20, usual.get("temporary_bytes")
        cells += [f"{mib:,.0f}", f"{one['temporary_bytes'] / of_usual:.2f}" if of_usual else ""]
        if one["seconds"] is None:
            rows.append([*cells, "", ""])
            continue
        cells += [f"{1e3 * one['seconds']:,.0f}", f"{one['seconds'] / usual['seconds']:.2f}"]
        rows.append(cells)
    return rows


if __name__ == "__main__":
    main()
