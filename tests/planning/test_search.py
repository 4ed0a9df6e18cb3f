"""The search for a faster step, with a compiler that only knows how long a step takes."""

from types import SimpleNamespace

import jax
import pytest

from dpojax.chips import CHIPS
from dpojax.config.errors import ConfigError
from dpojax.planning import search
from dpojax.planning.chips import Topology
from dpojax.planning.plan import CompiledProgram, Memory

from .test_programs import small

CHIPS_OF_TEST = Topology("h200:8", CHIPS["h200"], range(8))


def seconds_of(config) -> float:
    """Fastest with 32 rows, `dots` and a tensor axis of 2."""
    rows = abs(config.micro_rows - 32) / 32
    remat = {"none": 2.0, "dots": 0.0, "full": 1.0}[config.model.remat]
    return 10.0 + rows + remat + abs(config.mesh.tensor - 2)


@pytest.fixture
def compiled(monkeypatch):
    """The configs that were compiled, in order; `remat=none` breaks the compiler."""
    configs = []

    def plan_stage(config, name, topology):
        if config.mesh.data == 4:
            raise ConfigError("config.mesh: not this one")
        mesh = SimpleNamespace(shape=dict(config.mesh))
        batches = SimpleNamespace(shape=(config.micro_rows,))
        setup = SimpleNamespace(mesh=mesh)
        return SimpleNamespace(stage=SimpleNamespace(setup=setup, batches=batches), config=config)

    def programs(planned):
        footprint = SimpleNamespace(total=0)
        return [SimpleNamespace(config=planned.config, footprint=footprint)]

    def compile_program(step, topology):
        configs.append(step.config)
        if step.config.model.remat == "none":
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug of the compiler")
        line = SimpleNamespace(seconds=seconds_of(step.config))
        return CompiledProgram(step, Memory(1, 1, 1), line, 0.0)

    for replacement in (plan_stage, programs, compile_program):
        monkeypatch.setattr(search, replacement.__name__, replacement)
    return configs


def config():
    config = small()
    config.micro_rows = 8
    config.model.remat = "full"
    config.mesh.update(data=1, fsdp=8, tensor=1)
    return config


def test_the_search_finds_the_best_of_what_it_varies_and_says_its_keys(compiled):
    found = search.search(config(), "preference", CHIPS_OF_TEST, lambda line: None)
    best = found[0].keys
    assert (best["micro_rows"], best["model.remat"], best["mesh.tensor"]) == (32, "dots", 2)
    assert "--config.micro_rows=32" in found[0].flags
    times = [variant.seconds for variant in found]
    assert times == sorted(times)


def test_variants_that_are_refused_or_break_the_compiler_end_nothing_and_are_told(compiled):
    lines = []
    found = search.search(config(), "preference", CHIPS_OF_TEST, lines.append)
    problems = {variant.problem for variant in found}
    assert {"INTERNAL: a bug of the compiler", "config.mesh: not this one"} <= problems
    told = "\n".join(lines)
    assert "no: INTERNAL: a bug of the compiler" in told
    assert f"\n{len(found)}. " in told  # each has its number
    assert max(map(len, lines)) <= 100  # columns of a terminal


def test_a_program_that_several_variants_share_is_compiled_once(compiled):
    search.search(config(), "preference", CHIPS_OF_TEST, lambda line: None)
    good = [one for one in compiled if one.model.remat != "none"]
    shapes = [(dict(one.mesh).items(), one.micro_rows, one.model.remat) for one in good]
    assert len(shapes) == len({str(shape) for shape in shapes})
