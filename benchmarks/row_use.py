"""What share of the columns that are computed hold tokens, on data of one's own.

    python benchmarks/row_use.py --tokenizer FOLDER --source auto:PAIRS.jsonl hh:FOLDER
    python benchmarks/row_use.py --source completions:4x40

A table of batch sizes and row shards: use of columns and of scored slots with micro-batches of
several sizes, use with one size for all, and the time that the planner foretells, as a ratio. Costs
are a run's for GPT-2 small at the given width, on one CPU or on several TPUs; nothing is trained.
`completions:KxN` stands for what the frontier of configs/imdb.py learns from, whose lengths are
known without a model: 4,000 prefixes of 2 to 8 tokens, each with K completions of N.
"""

from __future__ import annotations

import argparse
import pathlib
import random
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh

from dpojax.config.defaults import default_config
from dpojax.data.examples import Example
from dpojax.data.packing import Costs, Shape, bucket_of, plan
from dpojax.data.rows import buckets_of, collate, needs_of
from dpojax.models import decoder
from dpojax.models.attention import XLA
from dpojax.models.config import GPT2, DecoderConfig
from dpojax.models.splash import SPLASH
from dpojax.sharding import AXES
from dpojax.stages.data import DataRequirements, load
from dpojax.stages.tokenizers import read_tokenizer
from dpojax.training.costs import packing_costs

LAYOUTS = ((8, 1), (16, 1), (64, 1), (64, 8))  # examples of a batch, row shards
COMPLETIONS = "completions"
CONFIG = default_config().model


class Use(NamedTuple):
    columns: float
    scored: float
    cost: float  # in tokens, of all batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="a Hugging Face folder, for sources that are files")
    parser.add_argument("--source", nargs="+", required=True, help="FORM:PATH")
    parser.add_argument("--width", type=int, default=768, help="of the model")
    args = parser.parse_args()
    files = [source for source in args.source if not source.startswith(f"{COMPLETIONS}:")]
    if files and not args.tokenizer:
        parser.error(f"{files[0]} needs --tokenizer")
    tokenizer = read_tokenizer(args.tokenizer) if files else None
    print("| data | pairs | batch x shards | use | scored | one size | time | sizes |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for source in args.source:
        form, path = source.split(":", 1)
        completions = form == COMPLETIONS
        examples = _completions(path) if completions else _examples(form, path, tokenizer)
        for batch_size, shards in LAYOUTS:
            print(_line(pathlib.Path(path), examples, batch_size, shards, args.width), flush=True)


def _examples(form: str, path: str, tokenizer) -> list[Example]:
    """All usable pairs or rankings, in random order."""
    config = default_config()
    config.preference.data.update(source=path, form=form, limit=0, eval_limit=1)
    config.tokens.update(max_length=1024, truncation="drop")
    loaded = load(
        config.preference.data,
        config.tokens,
        tokenizer,
        requirements=DataRequirements(),
        seed=0,
    )
    examples = list(loaded.examples)
    random.Random(0).shuffle(examples)
    return examples


def _completions(shape: str) -> list[Example]:
    """Rankings of K x N, of the lengths alone."""
    responses, tokens = map(int, shape.split("x"))
    prefixes = random.Random(0).choices(range(2, 9), k=4_000)
    answers, cut = (np.zeros(tokens, np.int32),) * responses, (False,) * responses
    return [
        Example(str(i), np.zeros(length, np.int32), answers, cut, None)
        for i, length in enumerate(prefixes)
    ]


def _line(path: pathlib.Path, examples: list[Example], batch: int, shards: int, width: int) -> str:
    batches = [range(i, i + batch) for i in range(0, len(examples) - batch + 1, batch)]
    plan_with = partial(plan, examples, batches, multiple=shards, costs=_costs(width, shards))
    shape = plan_with()
    use = _use(examples, batches, shape)
    one = _use(examples, batches, plan_with(max_buckets=1))
    sizes = ", ".join(f"{bucket.rows} x {bucket.length}" for bucket in shape.buckets)
    return (
        f"| {path.stem} | {len(examples)} | {batch} x {shards} | {use.columns:.1%} "
        f"| {use.scored:.1%} | {one.columns:.1%} | {use.cost / one.cost:.2f} "
        f"| {sizes or f'{shape.rows} x {shape.length}'} |"
    )


def _costs(width: int, shards: int) -> Costs:
    sizes = {"layers": 12, "width": width, "heads": width // 64, "mlp_width": 4 * width}
    config = DecoderConfig(**GPT2, **sizes, vocab_size=50257, max_positions=1024)
    params = jax.eval_shape(decoder.build(config).init, jax.random.key(0))
    platform, kernel = ("cpu", XLA) if shards == 1 else ("tpu", SPLASH)
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = AbstractMesh((shards, 1, 1), AXES, abstract_device=device)
    return packing_costs(
        config, params, mesh, remat=CONFIG.remat, dtype=CONFIG.compute_dtype, kernel=kernel
    )


def _use(examples: list[Example], batches: Sequence[range], shape: Shape) -> Use:
    """Tokens over columns, scored tokens over slots, and the cost, summed over all batches."""
    tokens = columns = scored = slots = cost = 0
    for batch in batches:
        rows = collate(examples, batch, shape)
        buckets, needs = buckets_of(rows), needs_of(rows)
        used = [buckets[i] for i in bucket_of(needs[needs[:, 0] > 0], buckets)]
        tokens += (rows.segment > 0).sum()
        scored += (rows.response >= 0).sum()
        columns += sum(bucket.rows * bucket.length for bucket in used)
        slots += sum(bucket.rows * bucket.scored for bucket in used)
        cost += sum(map(shape.costs.of, used))
    return Use(tokens / columns, scored / slots, cost)


if __name__ == "__main__":
    main()
