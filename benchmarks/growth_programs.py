"""The train steps whose growth benchmarks/growth.py looks at: what varies, and how it is measured.

Every point is the step that a run compiles: DPO with the reference's log-probs in its rows, AdamW,
clipping, donated state; for members of a sweep, the vectorised step. Models are small, of random
weights, in float32, and all rows are full.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.train_step import Case, make_model, synthetic_rows
from dpojax import sharding
from dpojax.config.defaults import default_config
from dpojax.data.rows import Rows
from dpojax.methods import preference
from dpojax.models import decoder
from dpojax.planning.hlo import collectives, product_flops
from dpojax.training.forward import NO_FROZEN_WEIGHTS, language_model
from dpojax.training.memory import temporary_bytes
from dpojax.training.state import (
    State,
    abstract_state,
    initial_state,
    make_optimizer,
    make_schedule,
    new_state,
)
from dpojax.training.step import build_step
from dpojax.training.vectorised_step import (
    MemberHyperparameters,
    abstract_member_states,
    build_vectorised_step,
    new_member_states,
    stack,
)

CONFIG = default_config().preference
OPTIONS = preference.resolve(CONFIG.loss, {})
DEVICES = (1, 2, 4, 8)
MESHES = ("data", "fsdp", "tensor", sharding.SWEEP)


class Point(NamedTuple):
    """One step: what varies has the value `x`."""

    x: int
    case: Case
    members: int = 0  # of a sweep; 0: the step of a single run
    mesh: str = "data"  # the axis that the devices lie on
    devices: int = 1


def _full(**sizes) -> Case:
    """2 layers, 128 wide; rows of one prompt and its responses, without padding."""
    case = Case(2, 128, **({"heads": 4, "vocabulary": 4096, "max_positions": 2048} | sizes))
    return case._replace(row_length=case.prompt + case.responses * case.response)


def _tokens(count: int) -> Point:
    """4,096 tokens in rows of `count`, half of them prompt."""
    sizes = {"pairs": 4096 // count, "prompt": count // 2, "response": count // 4}
    return Point(count, _full(vocabulary=1024, **sizes))


def _vocabulary(size: int) -> Point:
    """512 scored tokens, whose logits reach the cap at 4,096 words."""
    return Point(size, _full(vocabulary=size, prompt=64, response=64, max_logits=2**21))


def _responses(count: int) -> Point:
    return Point(count, _full(vocabulary=1024, prompt=256, response=32, responses=count))


def _members(count: int) -> Point:
    return Point(count, _full(prompt=64, response=64), members=count)


def _devices(mesh: str, devices: int) -> Point:
    """8 pairs in all; on the axis of a sweep 8 pairs for every member, one on a device."""
    sizes = {"heads": 8, "vocabulary": 2048, "prompt": 64, "response": 32, "max_positions": 256}
    members = devices if mesh == sharding.SWEEP else 0
    return Point(devices, _full(pairs=8, **sizes), members, mesh, devices)


def _chunks(size: int) -> Point:
    """8 pairs on 4 devices; beyond 2,048 words the head goes in chunks."""
    sizes = {"heads": 4, "prompt": 64, "response": 32, "max_positions": 256, "pairs": 8}
    return Point(size, _full(vocabulary=size, max_logits=2**19, **sizes), devices=4)


STUDIES: dict[str, tuple[Point, ...]] = {
    "tokens": tuple(map(_tokens, (128, 256, 512, 1024, 2048))),
    "vocabulary": tuple(map(_vocabulary, (1024, 4096, 16384, 32768, 65536))),
    "responses": tuple(map(_responses, (2, 4, 8, 16, 32))),
    "members": tuple(map(_members, (2, 4, 6, 8))),  # one alone is another program, without vmap
    "chunks": tuple(map(_chunks, (2048, 4096, 8192, 16384))),
    "devices": tuple(
        _devices(mesh, n) for mesh in MESHES for n in DEVICES if n > 1 or mesh == "data"
    ),
}


class Program(NamedTuple):
    """A compiled step."""

    compiled: jax.stages.Compiled
    compile_seconds: float  # lowering included
    start: Callable[[], tuple[Any, Callable]]  # -> state, and (state) -> (state, is it finite)
    facts: dict[str, float]


def measure(study: str, rounds: int) -> list[dict[str, Any]]:
    """Compile all points of a study in this process, and time them in `rounds` rounds over all.

    What lies on fake devices is not timed: they share the same cores.
    """
    jax.config.update("jax_num_cpu_devices", max(point.devices for point in STUDIES[study]))
    points = STUDIES[study]
    programs = [build(point) for point in points]
    samples: list[list[float]] = [[] for _ in points]
    if all(point.devices == 1 for point in points):
        running = [program.start() for program in programs]
        states = [state for state, _ in running]
        for _ in range(rounds + 1):
            for i, (_, step) in enumerate(running):
                began = time.perf_counter()
                states[i], finite = step(states[i])
                if not bool(np.all(finite)):  # waits for the device
                    raise FloatingPointError(f"{points[i]}: loss or gradient is not finite")
                samples[i].append(time.perf_counter() - began)
    return [
        {**point._asdict(), "case": point.case._asdict(), "study": study}
        | {"samples": timed[1:], "compile_seconds": program.compile_seconds}
        | program.facts
        for point, program, timed in zip(points, programs, samples)
    ]


def build(point: Point) -> Program:
    """Compile the step of a point from shapes alone."""
    case, on_sweep = point.case, point.mesh == sharding.SWEEP
    sizes = {"data": 1, "data" if on_sweep else point.mesh: point.devices}
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[: point.devices])
    model = make_model(case, vmapped=bool(point.members))
    optimizer = make_optimizer(CONFIG.optimizer)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    abstract = abstract_state(shapes, optimizer, mesh, decoder.SHARDING_RULES)
    forward = language_model(model, max_logits=case.max_logits * mesh.size)
    objective = preference.objective(CONFIG.loss, OPTIONS)

    def make_step(warmup, steps):
        schedule = make_schedule(CONFIG.schedule, warmup, steps)
        return build_step(forward, objective, optimizer, schedule)

    rows = synthetic_rows(case)
    rows = rows._replace(reference=np.zeros(rows.target.shape, np.float32))  # costs as any other
    build_one = _vectorised if point.members else _alone
    where = sharding.sweep_mesh(mesh, point.devices if on_sweep else 1) if point.members else mesh
    members = (point.members,) if point.members else ()
    with jax.set_mesh(where):
        step, arguments, start = build_one(make_step, abstract, where, *members)
        began = time.perf_counter()
        compiled = step.lower(arguments[0], _shapes(rows, where), *arguments[1:]).compile()
        seconds = time.perf_counter() - began
    start = partial(start, compiled, lambda: jax.jit(model.init)(jax.random.key(0)), rows)
    return Program(compiled, seconds, start, _facts(compiled, shapes, rows))


def _alone(make_step, abstract: State, mesh: Mesh):
    """The step of one run, its arguments without the rows, and what starts it."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    step = jax.jit(make_step(0, 10**6), donate_argnums=0, out_shardings=(shardings, None))
    hyper = _hyper(CONFIG.beta)

    def start(compiled, init, rows):
        placed = sharding.put_rows(rows, mesh)
        state = new_state(init(), make_optimizer(CONFIG.optimizer), abstract, seed=0)

        def run(state):
            state, report = compiled(state, placed, hyper)
            return state, report.finite

        return state, run

    return step, (abstract, hyper), start


def _vectorised(make_step, abstract: State, mesh: Mesh, members: int):
    """The step of all members of a sweep, which differ in beta; the rest as of `_alone`."""
    states = abstract_member_states(abstract, members, mesh)
    each = [
        MemberHyperparameters(
            hyper=_hyper(0.1 * (i + 1)),
            warmup_steps=jnp.int32(0),
            steps=jnp.int32(10**6),
            seed=jnp.int32(i),
        )
        for i in range(members)
    ]
    hyperparameters = stack(each, mesh)

    def make_state(params, seed):
        return initial_state(params, make_optimizer(CONFIG.optimizer), seed)

    def start(compiled, init, rows):
        placed = sharding.put_rows(rows, mesh)
        state = new_member_states(init(), make_state, hyperparameters.seed, states)

        def run(state):
            state, report = compiled(state, placed, hyperparameters, NO_FROZEN_WEIGHTS)
            return state, report.finite

        return state, run

    arguments = states, hyperparameters, NO_FROZEN_WEIGHTS
    return build_vectorised_step(make_step, states), arguments, start


def _hyper(beta: float) -> dict:
    return preference.hyper(OPTIONS | {"beta": beta, "learning_rate": CONFIG.learning_rate})


def _shapes(rows: Rows, mesh: Mesh) -> Rows:
    where = NamedSharding(mesh, PartitionSpec(None, sharding.ROWS))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), rows)


def _is_matrix(keys: tuple) -> bool:
    return re.search(r"kernel$|^embed/", sharding.path_of(keys)) is not None


def _facts(compiled: jax.stages.Compiled, params, rows: Rows) -> dict[str, Any]:
    """Memory, FLOPs and collectives of the program, and sizes of its inputs; of one device."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    counts, sizes = Counter(), Counter()
    for one in collectives(text):
        counts[one.kind] += one.times
        sizes[one.kind] += one.times * one.size
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        "temporary": temporary_bytes(compiled),
        "arguments": int(memory.argument_size_in_bytes),
        "outputs": int(memory.output_size_in_bytes),
        "flops": product_flops(text),
        "collectives": dict(counts),
        "collective_bytes": dict(sizes),
        "parameters": sum(x.size for _, x in leaves),
        "matrices": sum(x.size for keys, x in leaves if _is_matrix(keys)),
        "row_bytes": sum(x.nbytes for x in jax.tree.leaves(rows)),
        "rows": math.prod(rows.tokens.shape[:-1]),
        "scored": math.prod(rows.target.shape),  # padding included
    }
