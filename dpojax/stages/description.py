"""What a stage of examples is about to do, for a person."""

from __future__ import annotations

from typing import Any

import jax

from dpojax.stages.example_stage import ExampleStage
from dpojax.stages.setup import Setup


def describe(stage: ExampleStage) -> str:
    """The data report, then the model, the mesh, the data, the shape of a batch, and memory."""
    batches = stage.batches
    data, shape = batches.data, batches.shape
    parameters = f"{count(stage.setup.abstract_params)} parameters"
    if stage.adapters is not None:
        parameters += f" under adapters of {count(stage.adapters.abstract)}"
    smaller = ", ".join(f"{bucket.rows} x {bucket.length}" for bucket in shape.buckets[:-1])
    return (
        f"{report_text(stage)}\n{stage.name}: {parameters} on a mesh of {mesh_text(stage.setup)}; "
        f"{data.train:,} examples to train on and {len(data.held_out):,} held out; "
        f"{batches.steps:,} steps of {batches.batch_size} examples in at most "
        f"{shape.micro_batches} micro-batches of {shape.rows} rows x {shape.length} tokens, "
        f"{shape.scored} of them scored at most"
        + (f", the less full ones of {smaller}" if smaller else "")
        + f"\n{stage.name}: about {stage.footprint()} of each device"
    )


def report_text(stage: ExampleStage) -> str:
    """What became of the records."""
    reports = stage.batches.data.reports
    return "\n\n".join(f"{stage.name} data: {part}\n{report}" for part, report in reports.items())


def mesh_text(setup: Setup) -> str:
    """`data 2 x fsdp 4 x tensor 1`."""
    return " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())


def count(tree: Any) -> str:
    """How many numbers a tree of arrays or shapes has: `1,234,567`."""
    return f"{sum(x.size for x in jax.tree.leaves(tree)):,}"
