"""Time from preference pairs to token ids in Arrow arrays, beside `datasets.map`.

    python benchmarks/tokenise.py --tokenizer FOLDER --source PAIRS.jsonl.gz [MORE ...]

The systems take turns, `--rounds` times. All start from pairs in memory, and end with the ids of
the prompt and of both answers in Arrow arrays in memory. `datasets.map` calls the tokenizer as
preference trainers do, in batches of 1,000: on the prompt, and on the prompt with each answer; what
follows the prompt's ids are the answer's. The ids of both systems are compared. Seconds of the
processor count all processes, with their start. On a busy machine they say more than seconds of the
clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import datasets

from dpojax.data import processes
from dpojax.data.examples import Examples
from dpojax.data.records import Record
from dpojax.data.report import Report
from dpojax.data.sources import load_records
from dpojax.data.tokenise import CHUNK, tokenise_chunks
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.data.tokenizer_files import read_tokenizer
from dpojax.tables import text_table

BATCH = 1000
CONFIG = TokenizeConfig(max_length=1_000_000, identical="keep", empty="keep")


class Cost(NamedTuple):
    """Seconds of the processor, in all processes, and of the clock."""

    processor: float
    clock: float


def main() -> None:
    args = arguments()
    tokenizer = read_tokenizer(args.tokenizer)
    datasets.disable_progress_bars()
    records = [record for source in args.source for record in load_records(source)[0]]
    records = [record for record in records if isinstance(record.prompt, str)] * args.repeat
    systems = {
        ("datasets.map", 1): by_map,
        ("dpojax", 1): by_dpojax,
        ("datasets.map", 2): by_map,
        ("dpojax", 2): by_dpojax,
    }
    mapped, ours = (run(records, tokenizer, 1) for run in (by_map, by_dpojax))  # also warms up
    print(f"{len(records):,} pairs; {count_differing(mapped, ours)} of them with other ids")
    costs: dict[tuple, list[Cost]] = {name: [] for name in systems}
    for _ in range(args.rounds):
        for name, run in systems.items():
            costs[name].append(measure(lambda run=run, name=name: run(records, tokenizer, name[1])))
    print(table(costs, len(records)))
    if args.json:
        with open(args.json, "w") as file:
            named = {f"{name} {number}": each for (name, number), each in costs.items()}
            json.dump({"pairs": len(records), "seconds": named}, file)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--source", required=True, nargs="+", help="pairs of text, in any form")
    parser.add_argument("--repeat", type=int, default=1, help="how often the pairs are taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="a file for all measurements")
    return parser.parse_args()


def measure(run: Callable[[], Any]) -> Cost:
    """What a call costs; processes that have ended count as well."""
    start = used(), time.perf_counter()
    run()
    return Cost(used() - start[0], time.perf_counter() - start[1])


def used() -> float:
    """Seconds of the processor of this process, and of those that it started and that ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def table(costs: dict[tuple, list[Cost]], pairs: int) -> str:
    """Medians over the rounds, and how they compare with `datasets.map` in one process."""
    rows = [["", "processes", "pairs / CPU s", "against map", "pairs / s", "against map"]]
    first = costs["datasets.map", 1]
    for (name, number), each in costs.items():
        row = [name, str(number)]
        for kind in Cost._fields:
            mine, theirs = ([getattr(cost, kind) for cost in some] for some in (each, first))
            # Of one round: what else the machine did changes from round to round.
            ratio = statistics.median(b / a for a, b in zip(mine, theirs))
            row += [f"{pairs / statistics.median(mine):,.0f}", f"{ratio:.2f} x"]
        rows.append(row)
    return "\n".join(text_table(rows))


def count_differing(mapped: datasets.Dataset, ours: list[Examples]) -> int:
    """How many pairs have other ids in the two systems."""
    examples = [example for chunk in ours for example in chunk]
    if len(examples) != len(mapped):
        return max(len(examples), len(mapped))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return sum(
        [row[name] for name in names]
        != [part.tolist() for part in (example.prompt, *example.responses)]
        for row, example in zip(mapped, examples)
    )


def by_dpojax(records: list[Record], tokenizer: Any, number: int) -> list[Examples]:
    chunks = (records[start : start + CHUNK] for start in range(0, len(records), CHUNK))
    made = list(tokenise_chunks(chunks, tokenizer, CONFIG, Report(), num_proc=number))
    processes.end_idle()
    return made


def by_map(records: list[Record], tokenizer: Any, number: int) -> Any:
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [record.prompt for record in records],
            "chosen": [record.responses[0] for record in records],
            "rejected": [record.responses[1] for record in records],
        }
    )
    return rows.map(
        encode,
        batched=True,
        batch_size=BATCH,
        remove_columns=rows.column_names,
        num_proc=number if number > 1 else None,
        fn_kwargs={"tokenizer": tokenizer},
        keep_in_memory=True,
        load_from_cache_file=False,
    )


def encode(rows: dict[str, list[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
    """The function that is mapped over batches of rows."""
    prompts = rows["prompt"]
    ids = lambda texts: tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    encoded = {"prompt_ids": ids(prompts)["input_ids"]}
    for name in ("chosen", "rejected"):
        wholes = ids([prompt + answer for prompt, answer in zip(prompts, rows[name])])["input_ids"]
        encoded[f"{name}_ids"] = [
            [*whole[len(prompt) :], tokenizer.eos_token_id]
            for whole, prompt in zip(wholes, encoded["prompt_ids"])
        ]
    return encoded


if __name__ == "__main__":
    main()
