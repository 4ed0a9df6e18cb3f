"""The data of a recipe: one pass over its sources, and files that no prompt is in twice.

    python -m dpojax.recipes.data --config=CONFIG.json --out=FOLDER

A prompt may have many records (posts of TL;DR are compared again and again). All of them go to one
part, training, the judge or the test, by a hash of the prompt's text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.saved import config_from_json
from dpojax.data import sources
from dpojax.data.parsing import parse_rows
from dpojax.data.records import DataError, Record
from dpojax.data.records.pairs import author_summary
from dpojax.data.report import Report
from dpojax.recipes.recipe import FEW_SHOT, REJECTED, SHIFTED, TESTS, ZERO_SHOT
from dpojax.runs.command import run_command

COMPARISONS, DEMONSTRATIONS, JUDGE_COMPARISONS = "comparisons", "demonstrations", "judge"
TRAIN = "train"  # the part of the prompts that policies learn from
HELD_OUT = "held_out_"  # before the names of the first two
COUNTS = "data.json"  # written last
SHORT = 0.25  # share of the demonstrations, the shortest, that few-shot examples are taken from


class PromptRecords(NamedTuple):
    """A prompt with all that the records of a source say of it.

    Attributes:
      reference: a demonstration, else the best response of its first comparison.
      by_people: whether `reference` is a demonstration.
      rankings: the responses of each comparison, best first.
    """

    prompt: str
    reference: str
    by_people: bool
    rankings: list[tuple[str, ...]]


def make_data(config: ConfigDict, out: storage.Path) -> dict[str, Any]:
    """Write the recipe's files as JSON lines, and how many records each has into data.json.

    Raises:
      DataError: a source that cannot be read or holds nothing; a prompt that is not text.
    """
    recipe = config.recipe
    reports: dict[str, Report] = {}
    compared = _read("comparisons", recipe, reports)
    demonstrated = _read("demonstrations", recipe, reports) if recipe.demonstrations else compared
    tests = _read("tests", recipe, reports) if recipe.tests else None

    def part(prompt: str) -> str:
        share = draw("split", prompt)
        if share < recipe.test_share or (tests is not None and prompt in tests):
            return TESTS
        trained = share >= recipe.test_share + recipe.judge_share
        return TRAIN if trained else JUDGE_COMPARISONS

    comparisons: dict[str, list[dict]] = {name: [] for name in (TRAIN, JUDGE_COMPARISONS, TESTS)}
    for each in compared.values():
        comparisons[part(each.prompt)] += [_comparison(each.prompt, x) for x in each.rankings]
    demonstrations: dict[str, list[PromptRecords]] = {name: [] for name in comparisons}
    for each in demonstrated.values():
        demonstrations[part(each.prompt)].append(each)
    files = {
        COMPARISONS: comparisons[TRAIN],
        HELD_OUT + COMPARISONS: comparisons[TESTS],
        JUDGE_COMPARISONS: comparisons[JUDGE_COMPARISONS],
        DEMONSTRATIONS: [*map(_demonstration, demonstrations[TRAIN])],
        HELD_OUT + DEMONSTRATIONS: [*map(_demonstration, demonstrations[TESTS])],
    }
    if tests is not None:
        test_prompts = [*tests.values()]
    else:
        held_out = (x for x in compared.values() if part(x.prompt) == TESTS)
        test_prompts = [_demonstrated(x, demonstrated.get(x.prompt, x)) for x in held_out]
    prompting = Prompting(recipe, demonstrations[TRAIN])
    files[TESTS] = prompting.records(test_prompts, recipe.test_prompts)
    files[REJECTED] = [
        {"prompt": x.prompt, "response": x.rankings[0][-1]} for x in test_prompts if x.rankings
    ]
    if recipe.shifted:
        shifted = _read(SHIFTED, recipe, reports).values()
        files[SHIFTED] = prompting.records([*shifted], recipe.shifted_prompts)
    return _write(out, files, reports, test_prompts)


class Prompting:
    """Makes the records of prompts that are judged, with what an untrained model reads.

    Args:
      demonstrations: that few-shot examples are taken from.
    """

    def __init__(self, recipe: ConfigDict, demonstrations: Sequence[PromptRecords]):
        self.recipe = recipe
        by_length = sorted(demonstrations, key=lambda x: len(x.prompt) + len(x.reference))
        short = by_length[: max(recipe.shots, int(SHORT * len(by_length)))]
        examples = sorted(short, key=lambda x: draw("examples", x.prompt))[: recipe.shots]
        self.examples = "".join(f"{x.prompt}{x.reference.rstrip()}\n\n" for x in examples)

    def records(self, prompts: Sequence[PromptRecords], limit: int) -> list[dict]:
        """The first prompts, in an order that hashes decide, without those that are too long."""
        prompt, reference = self.recipe.max_words, self.recipe.max_reference_words
        used = [x for x in prompts if _fits(x.prompt, prompt) and _fits(x.reference, reference)]
        used.sort(key=lambda x: draw("order", x.prompt))
        return [self._record(x) for x in used[: limit or None]]

    def _record(self, each: PromptRecords) -> dict:
        instruction = self.recipe.instruction
        return {
            "prompt": each.prompt,
            "reference": each.reference,
            ZERO_SHOT: instruction + each.prompt,
            FEW_SHOT: instruction + self.examples + each.prompt,
        }


def _fits(text: str, words: int) -> bool:
    """Whether a text has at most so many words; 0 is any number."""
    return not words or len(text.split()) <= words


def draw(name: str, text: str) -> float:
    """A number in [0, 1) from a hash of `name` and `text`."""
    digest = hashlib.sha256(f"recipe {name}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _read(name: str, recipe: ConfigDict, reports: dict[str, Report]) -> dict[str, PromptRecords]:
    """What a source of the recipe holds, by prompt."""
    where, report = sources.listed(recipe[name], split=recipe[f"{name}_split"]), Report()
    by_prompt: dict[str, PromptRecords] = {}
    for record, reference in _records(where, report):
        prompt, responses = record.prompt, record.responses
        if not isinstance(prompt, str) or not all(isinstance(x, str) for x in responses):
            raise DataError(
                f"{record.id}: is a dialogue of messages; a recipe reads prompts that are text"
            )
        if not prompt or record.all_tied or not (reference or responses[0]).strip():
            continue
        reference, by_people = reference or responses[0], bool(reference) or len(responses) == 1
        each = by_prompt.setdefault(prompt, PromptRecords(prompt, reference, by_people, []))
        if by_people and not each.by_people:
            by_prompt[prompt] = each._replace(reference=reference, by_people=True)
        if len(responses) > 1:
            each.rankings.append(responses)
    if not by_prompt:
        why = f"{report.dropped} of {report.read} records cannot be used"
        raise DataError(f"config.recipe.{name} = {recipe[name]!r}: no record has a prompt; {why}")
    reports[name] = report
    return by_prompt


def _records(where: Sequence[sources.Source], report: Report) -> Iterator[tuple[Record, str]]:
    """Each record, with the response that people wrote where its row says which one that is."""
    for row, id in sources.read(where):
        for record in parse_rows([(row, id)], report):
            yield record, author_summary(row)


def _demonstrated(compared: PromptRecords, demonstration: PromptRecords) -> PromptRecords:
    """A prompt of comparisons, with a demonstration as its reference."""
    return demonstration._replace(rankings=compared.rankings)


def _comparison(prompt: str, responses: tuple[str, ...]) -> dict:
    if len(responses) == 2:
        return {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}
    return {"prompt": prompt, "responses": list(responses)}


def _demonstration(each: PromptRecords) -> dict:
    return {"prompt": each.prompt, "completion": each.reference}


def _write(
    out: storage.Path,
    files: dict[str, list[dict]],
    reports: dict[str, Report],
    tests: Sequence[PromptRecords],
) -> dict[str, Any]:
    """Write all files, and data.json; see `make_data`."""
    if not files[TESTS]:
        raise DataError(
            "config.recipe: no prompt is left to judge on; raise recipe.test_share or max_words, "
            "or name recipe.tests"
        )
    for name, records in files.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        storage.write_text(out / f"{name}.jsonl", lines)
    counts: dict[str, Any] = {
        "records": {name: len(records) for name, records in files.items()},
        "prompts": {
            name: len({record["prompt"] for record in records}) for name, records in files.items()
        },
        "test_references_by_people": sum(each.by_people for each in tests),
        "test_prompts_of_any_length": len(tests),
        "sources": {name: report.to_content() for name, report in reports.items()},
    }
    storage.write_json(out / COUNTS, counts)
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.recipes.data", description="Make the data of a recipe."
    )
    parser.add_argument("--config", required=True, help="a config as JSON")
    parser.add_argument("--out", required=True, help="the folder to write")
    options = parser.parse_args(arguments)
    values = storage.read_json(storage.as_path(options.config, "--config"), fields={})
    config = config_from_json(values, where=options.config)
    counts = make_data(config, storage.as_path(options.out, "--out"))
    for name, count in counts["records"].items():
        print(f"{name}: {count:,} records of {counts['prompts'][name]:,} prompts")


if __name__ == "__main__":
    run_command(main)
