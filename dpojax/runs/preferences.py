"""Preference data of a policy's own completions: drawn, scored by a reward, paired and written.

    generate_preferences(Settings(policy="runs/reviews:sft", prompts="reviews", limit=100,
                                  reward="reviews", out="pairs"))

or, as a command, with the settings as JSON,

    python -m dpojax.runs.preferences --settings=SETTINGS.json [--process=0/4] [--done=FILE]

The folder holds part-00000-of-00004.parquet, ..., one per `shard_size` prompts, which
`data.sources.load_records` reads, and provenance.json. A shard is written whole or not at all, and
one that is there is not made again. What it holds depends on the settings alone: not on the process
that makes it, nor on when.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpojax import storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.errors import ConfigError
from dpojax.data import pairing, reviews
from dpojax.data.pairing import Labels, pairs_of, ranking_of
from dpojax.data.prompts import EMBEDDED, read_prompts
from dpojax.data.records import DataError
from dpojax.evaluation.policies import encode_prompts, require_stops, response_texts
from dpojax.evaluation.rewards import Reward, open_reward
from dpojax.runs.command import run_command
from dpojax.runs.policy import Policy, load_policy
from dpojax.sampling import Sample, build_sampler, generate
from dpojax.stages.tokenizers import vocabulary_hash
from dpojax.training.reference import fingerprint
from dpojax.watchdog import MINUTES, watching

FORMAT = "dpojax preferences, version 3"  # changes when the same settings give other data
PROVENANCE = "provenance.json"
LIBRARIES = ("jax", "flax", "transformers", "tokenizers", "numpy", "pyarrow")
METADATA = b"dpojax"  # a shard's counts and versions, in the metadata of its schema
# A rerun may change these; of the first three, what they name is compared, not where it lies.
MAY_CHANGE = ("policy", "prompts", "reward", "out", "batch_size", "hang_minutes")
CHOICES = {
    "pairs": ("all", "best_worst", "ranked"),
    "labels": pairing.KINDS,
    "truncated": ("keep", "drop"),
    "split": reviews.SPLITS,
}
LEAST = {"skip": 0, "limit": 0, "completions": 2, "batch_size": 1, "shard_size": 1, "tie": 0}
LEAST |= {"seed": 0, "hang_minutes": 0}
COUNTS = ("prompts", "completions", "truncated", "empty", "identical", "ties", "records")
COUNTS += ("prompts_without_record",)
COLUMNS = {"prompt_index": pa.int64(), "prompt": pa.string()}
PAIR = pa.schema(
    COLUMNS
    | {name: pa.string() for name in ("chosen", "rejected")}
    | {name: pa.float64() for name in ("score_chosen", "score_rejected")}
)
RANKED = pa.schema(
    COLUMNS
    | {"responses": pa.list_(pa.string()), "scores": pa.list_(pa.float64())}
    | {"ranks": pa.list_(pa.int64())}
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to make; scripts/prefer.py has a flag for each.

    Attributes:
      policy: see `policy.load_policy`.
      prompts: see `data.prompts.read_prompts`.
      reward: see `rewards.open_reward`.
      out: the folder to write.
      split: of the prompts of "reviews" and of prefixes.
      skip: leave out so many prompts first.
      limit: use so many of the others; 0 is all.
      completions: K of each prompt.
      pairs: "all" pairs of completions, "best_worst": one pair of a prompt, "ranked": one list.
      labels, label_temperature, tie: see `pairing.Labels`.
      temperature, top_k, top_p, max_new_tokens: see `sampling.Sampler`.
      truncated: "keep" completions that were cut at max_new_tokens, or "drop" them. Training puts
        EOS behind those that are kept, as behind any other response.
      fixed_length: a shard whose completions were all cut is no error.
      batch_size, shard_size: prompts of a batch, and of a shard.
      hang_minutes: without progress, after which the process ends; 0: never.

    Raises:
      ConfigError: a value that cannot be; it is named.
    """

    policy: str
    prompts: str
    reward: str
    out: str
    split: str = "train"
    skip: int = 0
    limit: int = 0
    completions: int = 4
    pairs: str = "all"
    labels: str = "deterministic"
    label_temperature: float = 1.0
    tie: float = pairing.ROUNDING
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64
    truncated: str = "keep"
    fixed_length: bool = False
    batch_size: int = 64
    shard_size: int = 1024
    seed: int = 0
    hang_minutes: float = MINUTES

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: one of {', '.join(known)}")
        for name, lowest in LEAST.items():
            if not getattr(self, name) >= lowest:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be {lowest} or more")
        if not self.label_temperature > 0:
            raise ConfigError(f"label_temperature = {self.label_temperature}: must be positive")
        if self.seed >= 2**31:
            raise ConfigError(f"seed = {self.seed}: must be below 2**31")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature}: must be finite and not negative")
        if self.prompts == EMBEDDED and not self.limit:
            raise ConfigError("limit = 0: the prompts of reviews never end; say how many to use")


def generate_preferences(
    settings: Settings,
    *,
    process: tuple[int, int] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict:
    """Make the shards of this process that are missing; returns what provenance.json says.

    Its `counts` are there once all shards are, whichever process made them.

    Args:
      process: (index, count); shard i belongs to the process i % count. None: as JAX counts.
      log: gets a line per shard.

    Raises:
      ConfigError: the folder holds shards of other settings; it names what differs.
      DataError: prompts that are missing, or no text, or none behind those that are skipped.
      NothingStopped: all completions of a shard were cut; see `fixed_length`.
      RewardError, CheckpointError, OSError, ValueError: as policy and reward raise them.
    """
    index, count = process or (jax.process_index(), jax.process_count())
    if not 0 <= index < count:
        raise ConfigError(f"process {index} of {count}: they are counted from 0")
    with watching(settings.hang_minutes):
        return _generate(settings, index, count, log)


def _generate(settings: Settings, index: int, count: int, log: Callable[[str], None]) -> dict:
    out = storage.as_path(settings.out, "--out")
    policy = load_policy(settings.policy)
    prompts = _prompts(settings, policy)
    reward = open_reward(settings.reward, mesh=policy.mesh)
    provenance = _provenance(settings, prompts, policy, reward)
    if any(out.glob("part-*.parquet")):
        _compare(out / PROVENANCE, provenance)
    else:
        storage.write_json(out / PROVENANCE, provenance)
    make_shard = _build_shard(settings, policy, reward)
    paths = _paths(out, provenance["shards"])
    for number, path in list(enumerate(paths))[index::count]:
        if path.exists():
            log(f"{path.name}: is there already")
            continue
        start = number * settings.shard_size
        table = make_shard(prompts[start : start + settings.shard_size], start)
        _write_parquet(path, table)
        log(f"{path.name}: {counts_text(_metadata(table.schema)['counts'])}")
    if all(path.exists() for path in paths):
        provenance |= _totals([_metadata(_read_schema(path)) for path in paths])
        storage.write_json(out / PROVENANCE, provenance)
    return provenance


MADE = ("prompts", "completions", "records")  # the counts that are always shown


def counts_text(counts: Mapping[str, int]) -> str:
    """`16 prompts, 64 completions, 96 records; 14 truncated`."""
    made = [f"{counts[name]:,} {name}" for name in MADE]
    others = [f"{x:,} {name.replace('_', ' ')}" for name, x in counts.items() if name not in MADE]
    lost = [text for text in others if not text.startswith("0 ")]
    return "; ".join(filter(None, [", ".join(made), ", ".join(lost)]))


def _prompts(settings: Settings, policy: Policy) -> list[str]:
    """Those between `skip` and `skip` + `limit`."""
    limit = settings.limit and settings.skip + settings.limit
    prompts = read_prompts(
        settings.prompts,
        split=settings.split,
        limit=limit,
        seed=settings.seed,
        tokenizer=policy.tokenizer,
    )
    if len(prompts) <= settings.skip:
        raise DataError(
            f"{settings.prompts}: holds {len(prompts)} prompts, and skip = {settings.skip} leaves "
            "none of them; give more prompts, or skip fewer"
        )
    return prompts[settings.skip :]


def _provenance(settings: Settings, prompts: Sequence[str], policy: Policy, reward: Reward) -> dict:
    """provenance.json before there are counts."""
    inputs = {
        "policy": fingerprint(policy.params),
        "model": _hash(repr(policy.model.config)),
        "tokenizer": vocabulary_hash(policy.tokenizer),
        "stop": list(policy.stop),
        "prompts": _hash(json.dumps(prompts)),
        "reward": reward.fingerprint,
    }
    return {
        "format": FORMAT,
        "settings": dataclasses.asdict(settings),
        "inputs": inputs,
        "prompts": len(prompts),
        "shards": -(-len(prompts) // settings.shard_size),
        "counts": None,
        "versions": None,
    }


def _compare(path: storage.Path, provenance: dict) -> None:
    """Raise ConfigError where the shards that are there have other settings, or unknown ones."""
    try:
        before = _compared(storage.read_json(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: does not say what made the shards beside it ({error}); use another --out"
        ) from error
    now = _compared(provenance)
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        lines = "\n".join(f"  {name}: {before.get(name)!r}, now {now[name]!r}" for name in changed)
        raise ConfigError(
            f"{path.parent} holds preferences that were made otherwise; give these their own --out,"
            f" or take back these changes:\n{lines}"
        )


def _compared(provenance: dict) -> dict:
    """All that the shards depend on, flat."""
    settings = {name: x for name, x in provenance["settings"].items() if name not in MAY_CHANGE}
    inputs = {f"what is in {name}": value for name, value in provenance["inputs"].items()}
    return {"format": provenance["format"]} | settings | inputs


def _build_shard(settings: Settings, policy: Policy, reward: Reward) -> Callable:
    """(prompts, index of the first) -> a table with its counts."""
    sampler = build_sampler(policy.model, max_new_tokens=settings.max_new_tokens, stop=policy.stop)

    def make(prompts: Sequence[str], start: int) -> pa.Table:
        ids = encode_prompts(policy.tokenizer, prompts)
        with jax.set_mesh(policy.mesh):
            drawn = generate(
                sampler,
                policy.params,
                ids,
                batch_size=settings.batch_size,
                ids=range(settings.skip + start, settings.skip + start + len(prompts)),
                seed=settings.seed,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                samples=settings.completions,
            )
        if not settings.fixed_length:
            require_stops(drawn, sampler)
        texts = [response_texts(policy.tokenizer, *pair) for pair in zip(ids, drawn)]
        return _table(settings, reward, prompts, start, drawn, texts)

    return make


def _table(
    settings: Settings,
    reward: Reward,
    prompts: Sequence[str],
    start: int,
    drawn: Sequence[Sequence[Sample]],
    texts: Sequence[Sequence[str]],
) -> pa.Table:
    """The records of a shard; its schema carries the counts."""
    asked_prompts = [prompt for prompt, responses in zip(prompts, texts) for _ in responses]
    scores = reward(asked_prompts, [text for responses in texts for text in responses])
    stopped = np.array([sample.stopped for samples in drawn for sample in samples])
    counts = Counter(dict.fromkeys(COUNTS, 0), prompts=len(prompts), completions=len(scores))
    counts["truncated"] = int((~stopped).sum())
    rows = []
    for number, (prompt, responses) in enumerate(zip(prompts, texts)):
        at = slice(number * len(responses), (number + 1) * len(responses))
        # A dropped completion is left out like a blank one, but is not counted as blank.
        use = stopped[at] | (settings.truncated == "keep")
        used = [text for text, keep in zip(responses, use) if keep]
        records, left_out = _records(settings, start + number, used, scores[at][use])
        counts.update(left_out)
        counts["records"] += len(records)
        counts["prompts_without_record"] += not records
        rows += [{"prompt_index": start + number, "prompt": prompt} | record for record in records]
    schema = RANKED if settings.pairs == "ranked" else PAIR
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    metadata = {"counts": dict(counts), "score_sum": float(scores.sum()), "versions": versions}
    return pa.Table.from_pylist(rows, schema.with_metadata({METADATA: json.dumps(metadata)}))


def _records(
    settings: Settings, index: int, texts: Sequence[str], scores: np.ndarray
) -> tuple[list[dict], Counter]:
    """What one prompt's completions give, with randomness of its own."""
    labels = Labels(settings.labels, settings.label_temperature, settings.tie)
    rng = np.random.default_rng([settings.seed, settings.skip + index])
    scores = scores.tolist()
    if settings.pairs == "ranked":
        order, ranks, left_out = ranking_of(texts, scores, labels, rng)
        row = {
            "responses": [texts[i] for i in order],
            "scores": [scores[i] for i in order],
            "ranks": ranks,
        }
        return [row] * bool(order), left_out
    pairs, left_out = pairs_of(texts, scores, settings.pairs, labels, rng)
    rows = [
        {
            "chosen": texts[i],
            "rejected": texts[j],
            "score_chosen": scores[i],
            "score_rejected": scores[j],
        }
        for i, j in pairs
    ]
    return rows, left_out


def _totals(shards: Sequence[dict]) -> dict:
    """Counts over all shards, with the mean score, and the versions that made them."""
    counts = {name: sum(shard["counts"][name] for shard in shards) for name in COUNTS}
    mean = sum(shard["score_sum"] for shard in shards) / counts["completions"]
    versions = []
    for shard in shards:
        versions += [] if shard["versions"] in versions else [shard["versions"]]
    return {"counts": counts, "mean_score": mean, "versions": versions}


def _paths(out: storage.Path, shards: int) -> list[storage.Path]:
    return [out / f"part-{i:05d}-of-{shards:05d}.parquet" for i in range(shards)]


def _metadata(schema: pa.Schema) -> dict:
    return json.loads(schema.metadata[METADATA])


def _read_schema(path: storage.Path) -> pa.Schema:
    return pq.read_schema(storage.local_copy(path))


def _write_parquet(path: storage.Path, table: pa.Table) -> None:
    with storage.replacing(path) as unfinished, pq.ParquetWriter(unfinished, table.schema) as out:
        if len(table):  # `datasets` cannot read a group of no rows
            out.write_table(table)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def parse_process(text: str) -> tuple[int, int] | None:
    """(index, count) of "0/4"; None for "".

    Raises:
      ConfigError: another text.
    """
    try:
        index, count = map(int, text.split("/")) if text else (0, 0)
    except ValueError:
        raise ConfigError(f"process = {text!r}: INDEX/COUNT, such as 0/4") from None
    return (index, count) if text else None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.runs.preferences",
        description="Make preference data of a policy's own completions.",
    )
    parser.add_argument("--settings", required=True, help="a JSON file with the fields of Settings")
    parser.add_argument("--process", default="", help="INDEX/COUNT, of several that share the work")
    parser.add_argument("--done", default="", help="a file to write at the end")
    options = parser.parse_args(arguments)
    path = storage.as_path(options.settings, "--settings")
    with storage.damage_named(path):
        settings = Settings(**storage.read_json(path, fields={}))
    generate_preferences(settings, process=parse_process(options.process), log=print)
    if options.done:
        storage.write_text(storage.as_path(options.done), "")


if __name__ == "__main__":
    run_command(main)
