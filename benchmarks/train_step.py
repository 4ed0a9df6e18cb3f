"""The DPO train step on synthetic pairs of fixed length: speed, utilisation, memory.

    python benchmarks/train_step.py --json train_step.json            # every case
    python benchmarks/train_step.py --case tiny --steps 3

Each case runs in a process of its own, on one device, with the programs that a run uses. Between
any two timed steps the matmul rate is measured with products of the model's sizes, so that both
see the same machine; on Linux, samples during which other processes took CPU time do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import sharding
from dpojax.chips import chip_of
from dpojax.config.defaults import default_config
from dpojax.data.examples import Example
from dpojax.data.packing import Shape, plan
from dpojax.data.rows import Rows, collate
from dpojax.methods import preference
from dpojax.models import decoder, kernels
from dpojax.models.config import GPT2, DecoderConfig
from dpojax.models.published import published_config
from dpojax.training.forward import build_score, language_model
from dpojax.training.memory import predict
from dpojax.training.state import abstract_state, make_optimizer, make_schedule, new_state
from dpojax.training.step import build_step
from dpojax.training.throughput import memory_bytes, model_flops

CORES = os.cpu_count()
QUIET = 0.05  # share of the machine's CPU time that others may take during a quiet sample
BURST = 0.3  # seconds of matrix products after each step


class Case(NamedTuple):
    """What is trained on what; `row_length` 0 leaves the choice to `packing.plan`."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    pairs: int = 4
    prompt: int = 128
    response: int = 128
    responses: int = 2  # to each prompt
    dtype: str = "float32"  # of matrix products; weights and log-probs are float32
    reference: str = "cached"  # or live: scored in every step
    row_length: int = 0
    remat: str = default_config().model.remat
    max_logits: int = default_config().max_logits
    max_positions: int = 1024
    attention: str = "auto"  # the kernel, as `models.kernels.choose` takes it
    model: str = ""  # its name in `models.published`, in place of GPT-2 with these sizes
    small: bool = False  # that model's layout with the sizes of SMALL


SMALL = {"layers": 2, "width": 64, "mlp_width": 128, "vocab_size": 512, "max_positions": 512}
SMALL |= {"heads": 4, "head_dim": 16}
CASES = {
    "tiny": Case(4, 256, 4, 8192, pairs=16, prompt=64, response=64),
    "gpt2-small": Case(),
    "gpt2-small-live": Case(reference="live"),
    "gpt2-small-bfloat16": Case(dtype="bfloat16"),
}

COLUMNS = (  # heading, field, width, format
    ("case", "case", 20, "s"),
    ("rows", "rows", 9, "s"),
    ("s/step", "seconds_per_step", 8, ".3f"),
    ("pairs/s", "pairs_per_second", 8, ".2f"),
    ("tokens/s", "tokens_per_second", 9, ",.0f"),
    ("model GF/s", "model_gflops_per_second", 11, ",.1f"),
    ("matmul GF/s", "matmul_gflops_per_second", 12, ",.1f"),
    ("ratio", "utilisation", 6, ".2f"),
    ("peak GiB", "peak_gib", 9, ".2f"),
    ("compile s", "compile_seconds", 10, ".1f"),
    ("quiet", "quiet", 7, "s"),
)

LEGEND = """
s/step       median over the quiet samples (over all of them if fewer than 3 were quiet)
tokens/s     tokens without padding; a pair's prompt is computed, and counted, once
model GF/s   2 FLOPs per token and weight of the layers, and per scored token and weight of the LM
             head; thrice that with the gradient, and once more for a live reference. Attention
             scores, recomputation and the optimiser are not counted
matmul GF/s  chained MLP products of the model's sizes and dtype, timed between the steps
ratio        model / matmul, sample by sample; median
peak GiB     of the device where it counts, else the process's resident memory
compile s    of the step, lowering included"""


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    changes = {key: value for key, value in vars(args).items() if key in Case._fields}
    results = []
    for name in [args.case] if args.case else CASES:
        # A process that was not forked, and so has nobody else's peak memory.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            result = fresh.submit(measure, CASES[name]._replace(**changes), args.steps).result()
        results.append({"case": name} | result)
        if len(results) == 1:
            print(f"{result['device']}, jax {jax.__version__}\n")
            print("".join(f"{heading:>{width}}" for heading, _, width, _ in COLUMNS))
        print("".join(f"{results[-1][key]:>{w}{f}}" for _, key, w, f in COLUMNS), flush=True)
    print(LEGEND)
    if args.json:
        unfinished = args.json.with_name(f".{args.json.name}.unfinished")
        unfinished.write_text(json.dumps(results, indent=2) + "\n")
        unfinished.replace(args.json)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--case", choices=list(CASES), help="only this one; default: all, one after another")
    add("--steps", type=int, default=7, help="quiet samples to take; twice as many are tried")
    add("--json", type=pathlib.Path, metavar="OUT", help="also write the results here")
    unset = {"default": argparse.SUPPRESS}  # the case's own value
    add("--row-length", type=int, help="tokens of a row, 0: as packing.plan chooses", **unset)
    add("--remat", choices=list(decoder.REMAT), help="what is computed again backward", **unset)
    add("--max-logits", type=int, help="float32 logits that may exist at once", **unset)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: at least one step has to be timed")
    return args


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Time at least `steps` steps of `case` in this process, on its first device.

    Returns the case's fields, what COLUMNS names, the memory that was predicted and that the
    compiler counts, MFU, and every sample: seconds of the step, matmul FLOP/s, and the share of the
    machine's CPU time that others took.
    """
    device = jax.local_devices()[0]
    mesh = sharding.make_mesh(devices=[device])
    with jax.set_mesh(mesh):
        step, flops, rows, about = _build(case, mesh)
        multiply = _build_matmul(case, int((rows.segment > 0).sum()))
        step(), multiply()
        samples = []
        while len(samples) < 2 * steps and sum(s["others"] < QUIET for s in samples) < steps:
            began, others = time.perf_counter(), _others_cpu_seconds()
            step()
            seconds, rate = time.perf_counter() - began, multiply()
            share = (_others_cpu_seconds() - others) / (time.perf_counter() - began) / CORES
            samples.append({"seconds": seconds, "matmul": rate, "others": share})
    quiet = [s for s in samples if s["others"] < QUIET]
    used = quiet if len(quiet) >= min(3, steps) else samples
    seconds = statistics.median(s["seconds"] for s in used)
    ((memory, peak),) = memory_bytes().items()  # the name says whose
    chip = chip_of(device)
    return {
        **case._asdict(),
        "device": f"{device.device_kind} ({CORES} CPU cores)",
        "rows": f"{math.prod(rows.tokens.shape[:2])} x {rows.tokens.shape[2]}",
        "seconds_per_step": seconds,
        "pairs_per_second": case.pairs / seconds,
        "tokens_per_second": int((rows.segment > 0).sum()) / seconds,
        "model_gflops_per_second": flops / seconds / 1e9,
        "matmul_gflops_per_second": statistics.median(s["matmul"] for s in used) / 1e9,
        "utilisation": statistics.median(flops / s["seconds"] / s["matmul"] for s in used),
        "mfu": None if chip is None else flops / seconds / chip.flops,  # of the data sheet's peak
        "peak_gib": peak / 2**30,
        "memory": memory,
        **about,
        "quiet": f"{len(quiet)}/{len(samples)}",
        "samples": samples,
    }


def _build(case: Case, mesh) -> tuple[Callable[[], None], float, Rows, dict[str, float]]:
    """(one step, waited for; its model FLOPs; its rows; seconds and memory), as a run has them."""
    config = default_config().preference
    model, optimizer = make_model(case), make_optimizer(config.optimizer)
    params = jax.jit(model.init)(jax.random.key(0))
    abstract = abstract_state(params, optimizer, mesh, decoder.SHARDING_RULES)
    rows = synthetic_rows(case)
    flops = _flops(case, params, rows)
    score = jax.jit(build_score(model, max_logits=case.max_logits))
    cached = np.asarray(score(params, sharding.put_rows(rows, mesh)).logprob)
    live = jax.tree.map(jnp.copy, params) if case.reference == "live" else None
    state = new_state(params, optimizer, abstract, seed=0)
    options = preference.resolve(config.loss, {})
    hyper = preference.hyper(options | {"learning_rate": config.learning_rate})

    def placed() -> Rows:
        if live is None:
            return sharding.put_rows(rows._replace(reference=cached), mesh)
        on_mesh = sharding.put_rows(rows, mesh)
        return on_mesh._replace(reference=score(live, on_mesh).logprob)

    objective, schedule = (
        preference.objective(config.loss, options),
        make_schedule(config.schedule, 20, 10**6),
    )
    forward = language_model(model, max_logits=case.max_logits)
    train = build_step(forward, objective, optimizer, schedule)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    train = jax.jit(train, donate_argnums=0, out_shardings=(shardings, None))
    began = time.perf_counter()
    train = train.lower(state, placed(), hyper).compile()
    about = {"compile_seconds": time.perf_counter() - began}
    about |= _memory(case, model, abstract, rows, mesh, train)

    def step() -> None:
        nonlocal state
        state, report = train(state, placed(), hyper)
        if not bool(report.finite):  # waits for the device
            raise FloatingPointError(f"{case}: loss or gradient is not finite")

    return step, flops, rows, about


def _memory(case: Case, model, abstract, rows: Rows, mesh, compiled) -> dict[str, float]:
    """GiB of the step: as a run predicts them, and as the compiler counts them."""
    sizes = compiled.memory_analysis()
    counted = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    counted += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    live = abstract.params if case.reference == "live" else None  # no argument of the step
    footprint = predict(
        model.config,
        Shape(*rows.tokens.shape, rows.target.shape[2], *rows.present.shape[2:]),
        mesh,
        state=abstract,
        frozen=live,
        remat=case.remat,
        dtype=case.dtype,
        kernel=model.kernel,
        max_logits=case.max_logits,
    )
    return {"predicted_gib": footprint.total / 2**30, "compiled_gib": counted / 2**30}


def make_model(case: Case, *, vmapped: bool = False) -> decoder.Model:
    """The model of a case with random weights; `vmapped`: for the members of a sweep."""
    config, dtype = decoder_config(case), jnp.dtype(case.dtype)
    device = jax.local_devices()[0]
    kernel = kernels.choose(case.attention, config, dtype, device, vmapped=vmapped)
    return decoder.build(config, compute_dtype=dtype, remat=case.remat, kernel=kernel)


def decoder_config(case: Case) -> DecoderConfig:
    """The shape of a case's model."""
    if not case.model:
        sizes = {"width": case.width, "mlp_width": 4 * case.width, "heads": case.heads}
        sizes |= {"layers": case.layers, "max_positions": case.max_positions}
        return DecoderConfig(**GPT2, **sizes, vocab_size=case.vocabulary)
    published = published_config(case.model)
    if published is None:
        raise ValueError(f"{case.model!r} is no model of dpojax/models/published.py")
    if not case.small:
        return published
    grouped = published.kv_heads < published.heads
    kv_heads = SMALL["heads"] // 2 if grouped else SMALL["heads"]
    return dataclasses.replace(published, **SMALL, kv_heads=kv_heads)


def synthetic_rows(case: Case) -> Rows:
    """One optimiser batch of random tokens, all lengths equal, in one micro-batch."""
    rng, vocabulary = np.random.default_rng(0), decoder_config(case).vocab_size

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, vocabulary, length, np.int32)

    whole, batch = (False,) * case.responses, range(case.pairs)
    examples = []
    for i in batch:
        prompt = ids(case.prompt)
        responses = tuple(ids(case.response) for _ in range(case.responses))
        examples.append(Example(f"synthetic:{i + 1}", prompt, responses, whole, None))
    tokens = case.prompt + case.responses * case.response  # of one example
    length = case.row_length or tokens
    rows = -(-case.pairs // (length // tokens))
    return collate(examples, batch, plan(examples, [batch], length=length, micro_rows=rows))


def _flops(case: Case, params: dict, rows: Rows) -> float:
    """Model FLOPs of one step, and of the live reference's forward pass."""
    leaves = jax.tree_util.tree_leaves_with_path(params["blocks"])
    body = sum(x.size for keys, x in leaves if sharding.path_of(keys).endswith("kernel"))
    head = params["embed"]["tokens"].size
    tokens, scored = int((rows.segment > 0).sum()), int((rows.response >= 0).sum())
    reference = model_flops(body, head, tokens, scored, backward=False)
    return model_flops(body, head, tokens, scored) + reference * (case.reference == "live")


def _build_matmul(case: Case, tokens: int) -> Callable[[], float]:
    """A burst of x -> (x @ up) @ down of the model's MLP, timed: FLOP/s."""
    config = decoder_config(case)
    width, hidden = config.width, config.mlp_width
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (tokens, width), (width, hidden), (hidden, width)
    # Variance 1 throughout: zeros and denormals take other times than a model's numbers.
    factors = [
        (jax.random.normal(key, shape) * scale).astype(case.dtype)
        for key, shape, scale in zip(keys, shapes, (1.0, width**-0.5, hidden**-0.5))
    ]

    @jax.jit
    def chain(n, x, up, down):
        return jax.lax.fori_loop(0, n, lambda _, x: (x @ up) @ down, x)

    def timed(n: int) -> float:
        began = time.perf_counter()
        chain(n, *factors).block_until_ready()
        return time.perf_counter() - began

    timed(1)  # compiles
    count = max(1, round(BURST / min(timed(1) for _ in range(3))))
    return lambda: count * 2 * math.prod((2, tokens, width, hidden)) / timed(count)


def _others_cpu_seconds() -> float:
    """CPU time that all other processes have had since the machine started; 0 if not known."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *interrupts_and_steal = map(int, stat.read_text().split()[1:9])
    ticks = user + nice + system + sum(interrupts_and_steal)
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


if __name__ == "__main__":
    main()
