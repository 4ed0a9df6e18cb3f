"""Predicted memory of a step against the compiler's, on chips that are not there.

    pip install 'jax[tpu]' 'jax[cuda13]'
    JAX_PLATFORMS=cpu python benchmarks/predicted_memory.py [PART_OF_A_CASE ...]

Each case is compiled in a process of its own: half a minute for GPUs, minutes for TPUs. A live
reference lies beside the step's arguments: its weights count as arguments here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import NamedTuple

MARK = "result: "


class Case(NamedTuple):
    """A DPO step with products in bfloat16.

    Attributes:
      model: by its name on the hub.
      topology: of the chips.
      rows: on each row shard of the mesh.
      length: columns of a row, half of them scored.
      remat: of `config.model.remat`.
      micro_batches: whose gradients are added up.
      tensor: devices along this axis; all others are along fsdp.
      lora: rank of adapters; 0 trains all weights.
      members: of a sweep that trains as one program, each with devices of its own if there are
        as many.
      live: whether the reference scores every batch, and is not cached.
    """

    model: str
    topology: str
    rows: int
    length: int
    remat: str
    micro_batches: int
    tensor: int = 1
    lora: int = 0
    members: int = 1
    live: bool = False


LLAMA_8B, LLAMA_1B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"
PYTHIA, GPT2 = "EleutherAI/pythia-2.8b", "openai-community/gpt2-large"
CASES = (
    Case(LLAMA_8B, "h200:8", 2, 2048, "full", 1),
    Case(LLAMA_8B, "h200:8", 2, 2048, "dots", 4),
    Case(LLAMA_8B, "h200:8", 2, 2048, "full", 4, tensor=4),
    Case(LLAMA_8B, "h200:2", 2, 2048, "full", 2, lora=16),
    Case(PYTHIA, "h100:8", 4, 1024, "none", 1),
    Case(LLAMA_1B, "h200:1", 4, 2048, "dots", 1),
    Case(LLAMA_1B, "h200:1", 4, 2048, "dots", 1, lora=16),
    Case(GPT2, "h200:1", 8, 1024, "dots", 1),
    Case(GPT2, "h200:1", 8, 1024, "full", 4),
    Case(GPT2, "h200:1", 8, 1024, "full", 2, live=True),
    Case(GPT2, "h200:1", 4, 1024, "full", 1, members=4),
    Case(LLAMA_1B, "h200:4", 4, 2048, "dots", 1, members=4),
    Case(LLAMA_8B, "h200:8", 2, 2048, "full", 1, members=4),
    Case(LLAMA_8B, "v5e:4x8", 1, 2048, "full", 1),
    Case(LLAMA_8B, "v5p:2x2x2", 2, 2048, "dots", 2),
    Case(PYTHIA, "v5e:4x4", 1, 2048, "full", 1),
    Case(LLAMA_1B, "v5e:2x2", 1, 2048, "dots", 1),
    Case(LLAMA_1B, "v5e:2x2", 1, 2048, "full", 1, live=True),
    Case(LLAMA_1B, "v5e:2x2", 1, 2048, "full", 1, lora=16),
    Case(GPT2, "v5e:2x2", 4, 1024, "dots", 2),
    Case(GPT2, "v5e:2x2", 4, 1024, "full", 2, live=True),
    Case(GPT2, "v6e:2x2", 2, 1024, "full", 1, members=4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="only cases that have one of these in their text")
    parser.add_argument("--case", type=int, help="compile this one in this process")
    args = parser.parse_args()
    if args.case is not None:
        print(MARK + json.dumps(measure(CASES[args.case])), flush=True)
        return
    for index, case in enumerate(CASES):
        if not args.parts or any(part in str(case) for part in args.parts):
            measured = in_a_process(index)
            print(line(case, measured), flush=True)
            print(measured, file=sys.stderr, flush=True)


def in_a_process(index: int) -> dict:
    """`measure` of a case in a new process, which gives its memory back."""
    command = [sys.executable, __file__, f"--case={index}"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    for text in ended.stdout.splitlines():
        if text.startswith(MARK):
            return json.loads(text.removeprefix(MARK))
    return {"error": f"status {ended.returncode}"}


def measure(case: Case) -> dict:
    """GiB a device: of arguments, of temporary arrays, and predicted; seconds of compilation."""
    import jax

    from dpojax.config.defaults import default_config
    from dpojax.data.packing import Shape
    from dpojax.planning.chips import topology
    from dpojax.planning.expected import expected_data
    from dpojax.planning.programs import sweep_of
    from dpojax.plans.dry_run import setup_from_shapes
    from dpojax.stages import registry, train
    from dpojax.training.memory import bytes_per_device

    jax.config.update("jax_enable_compilation_cache", False)
    chips = topology(case.topology)
    config = default_config()
    config.stages = ("preference",)
    config.model.update(path=case.model, compute_dtype="bfloat16", remat=case.remat)
    config.model.attention = "flash" if chips.chip.platform == "gpu" else "splash"
    spread = case.members if case.members <= len(chips.devices) else 1
    config.mesh.update(data=spread, fsdp=-1, tensor=case.tensor)
    config.tokens.max_length = case.length
    config.preference.lora.rank = case.lora
    config.preference.reference.kind = "live" if case.live else "cached"
    config.plan.update(examples=1, prompt=100.0, response=50.0)
    setup = setup_from_shapes(config, "preference", chips.devices)
    stage = registry.open_stage(setup, "preference")
    rows = case.rows * len(chips.devices) // (case.tensor * spread)
    shape = Shape(case.micro_batches, rows, case.length, case.length // 2, 2, 2)
    stage = stage.with_data(expected_data(config, responses=2)).with_shape(shape)
    swept = sweep_of(stage, case.members, spread) if case.members > 1 else None
    began = time.perf_counter()
    step = train.lower_step(stage, shape) if swept is None else swept.lower()
    sizes = step.compile().memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    beside = bytes_per_device(stage.live_reference_shapes())
    footprint = train.footprint(stage) if swept is None else swept.footprint
    return {
        "arguments": (sizes.argument_size_in_bytes + beside) / 2**30,
        "temporary": (sizes.temp_size_in_bytes + results) / 2**30,
        "predicted": footprint.total / 2**30,
        "parts": {name: size / 2**30 for name, size in footprint._asdict().items()},
        "seconds": time.perf_counter() - began,
    }


def line(case: Case, found: dict) -> str:
    """A row of a Markdown table."""
    more = [f"tensor {case.tensor}"] if case.tensor > 1 else []
    more += [f"LoRA {case.lora}"] if case.lora else []
    more += [f"sweep of {case.members}"] if case.members > 1 else []
    more += ["live reference"] if case.live else []
    model = case.model.rpartition("/")[2]
    rows = f"{case.micro_batches} x {case.rows} x {case.length:,}"
    cells = [model, case.topology, rows, ", ".join([case.remat, *more])]
    if "error" in found:
        return f"| {' | '.join([*cells, found['error']])} |"
    total = found["arguments"] + found["temporary"]
    cells += [f"{found['arguments']:.1f} + {found['temporary']:.1f}", f"{found['predicted']:.1f}"]
    return f"| {' | '.join([*cells, format(found['predicted'] / total - 1, '+.0%')])} |"


if __name__ == "__main__":
    main()
