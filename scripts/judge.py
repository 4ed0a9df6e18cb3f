"""Judge: python scripts/judge.py --a=runs/dpo --b=references --prompts=pairs.jsonl \\
    --judge=openai:MODEL@URL --out=judged

Draws responses of policies to prompts, asks a judge in both orders which of two is better, and
writes win rates with 95 % intervals: OUT/report.md, win_rates.csv, win_rates.png and .pdf, and
samples.jsonl. The same command again draws and asks only what is missing.

A side (--a, which may be repeated, and --b) is a hub name, a Hugging Face folder, WORKDIR[:STAGE]
of a run, a file of responses (`prompt` or `id`, and `response` in each record), or "references",
the chosen responses of the prompts. NAME=SIDE names it in tables.

A finished frontier needs no more than its folder: it is judged by its true reward against the SFT
policy, each method by its run with the highest reward, or by that nearest to --at_kl:
    python scripts/judge.py --frontier=runs/frontier

A judge that is compared with people:
    python scripts/judge.py --humans=comparisons.jsonl --judge=length
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from absl import flags

from dpojax.runs.command import run_script

TEXT, TEXTS = flags.DEFINE_string, flags.DEFINE_multi_string
NUMBER, COUNT = flags.DEFINE_float, flags.DEFINE_integer

A = TEXTS("a", [], "A side that is judged; may be repeated.")
B = TEXT("b", None, "The side that it is compared with; default: references.")
FRONTIER = TEXT("frontier", None, "The workdir of a finished frontier, in the place of a and b.")
AT_KL = NUMBER("at_kl", None, "Frontier: of each method the run nearest to this KL, in nats.")
METHODS = flags.DEFINE_list("methods", [], "Frontier: only these methods.")
HUMANS = TEXT("humans", None, "Human comparisons to compare the judge with, in the place of a, b.")
TEXT("out", None, "The folder to write; default: judged, or WORKDIR/judged of a frontier.")

TEXT("prompts", None, "reviews, .txt, prefixes:SOURCE, or any data of pairs, responses, prompts.")
TEXT("split", None, "Of the data: test, train[:1000].")
TEXT("columns", None, "Names of the data's fields: prompt=post,completion=summary.")
TEXT("form", None, "Of the data's rows, as in --config.sft.data.form.")
COUNT("skip", None, "Distinct prompts to leave out first.")
COUNT("limit", None, "Distinct prompts behind those; 0 is all.")

TEXT("judge", None, "exact, length, reward_model:FOLDER, classifier:FOLDER, openai:MODEL@URL, ...")
TEXT("template", None, "The judge's prompt: summary, concise, helpful, or a file of your own.")
NUMBER("tie", None, "Judges that score: scores at most so far apart are a tie.")
NUMBER("repeat", None, "Share of the questions that are asked twice, to see if the judge agrees.")
COUNT("judge_batch_size", None, "Texts that a local judge reads at a time.")
NUMBER("max_cost", None, "Stop asking before this is paid, in the currency of the prices.")
NUMBER("price_in", None, "Of a million tokens that the endpoint reads.")
NUMBER("price_out", None, "Of a million tokens that the endpoint writes.")
COUNT("concurrency", None, "Requests to the endpoint at a time.")
NUMBER("requests_per_minute", None, "Most requests; 0 is no limit.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only count calls, tokens and cost; draw nothing.")
EXPORT = TEXT("export_batch", None, "Write the open questions as a batch file, and ask none.")
IMPORT = TEXT("import_batch", None, "Take the replies of a batch file first.")

TEMPERATURES = flags.DEFINE_list("temperatures", None, "Of the responses of a: 0,0.25,0.5,0.75,1.")
NUMBER("b_temperature", None, "Of those of b; default: that of the a it is compared with.")
BEST_OF = flags.DEFINE_list("best_of", None, "The best of so many responses by a reward: 1,16,128.")
TEXT("best_of_reward", None, "reviews, classifier:FOLDER[:LABEL], reward_model:FOLDER.")
COUNT("samples", None, "Responses of each side to each prompt.")
COUNT("max_new_tokens", None, "The longest response.")
TEXT("stop_text", None, "A response ends before this text.")
PROMPTED = TEXTS("prompted", [], "NAME=FILE[:SHOTS]: the side NAME reads prompts in this template.")
TEXT("examples", None, "Data whose first records are the examples of few-shot prompting.")
COUNT("batch_size", None, "Responses that are drawn at a time.")
COUNT("seed", None, "Of prompts, responses and intervals.")
TEXT("responses", None, "Folder that keeps responses, for several calls; default: OUT/responses.")
TEXT("verdicts", None, "Folder that keeps verdicts, for several calls; default: OUT/verdicts.")


def main() -> int:
    from dpojax.runs import judging

    settings = read_settings()
    if DRY_RUN.value:
        print(judging.describe_estimate(judging.estimate_cost(settings, log=tell)))
        return 0
    print(judging.terminal_table(judging.judge(settings, log=tell)))
    print(
        f"\n{settings.out}: report.md, win_rates.csv, win_rates.png, win_rates.pdf, samples.jsonl"
    )
    return 0


def tell(line: str) -> None:
    """Progress, which is no part of the result."""
    print(line, file=sys.stderr, flush=True)


def read_settings() -> Any:
    """The settings that the flags say; raises UsageError for a value that cannot be."""
    from dpojax import storage
    from dpojax.config.command_line import UsageError
    from dpojax.config.errors import ConfigError
    from dpojax.runs.judging_settings import Settings

    names = {field.name for field in dataclasses.fields(Settings)} - {"a", "b"}
    values = {
        name: flags.FLAGS[name].value
        for name in names & set(flags.FLAGS)
        if flags.FLAGS[name].value is not None
    }
    values |= numbers("temperatures", TEMPERATURES.value, float)
    values |= numbers("best_of", BEST_OF.value, int)
    values |= template_of(values.pop("template", None))
    if FRONTIER.value is not None:
        from dpojax.frontier.judged import frontier_settings

        if A.value or B.value or PROMPTED.value:
            raise UsageError("--frontier: names its sides itself; leave out --a, --b, --prompted")
        folder = storage.as_path(FRONTIER.value, "--frontier")
        if not folder.is_dir():
            raise UsageError(f"--frontier={FRONTIER.value}: no such folder")
        return frontier_settings(folder, at_kl=AT_KL.value, methods=METHODS.value, **values)
    if AT_KL.value is not None or METHODS.value:
        raise UsageError("--at_kl, --methods: choose runs of a --frontier; name one")
    required = {"a": A.value, "prompts": values.get("prompts"), "judge": values.get("judge")}
    if missing := [f"--{name}" for name, value in required.items() if not value]:
        raise UsageError(f"{', '.join(missing)}: missing (or --frontier=FOLDER)")
    values.setdefault("out", "judged")
    try:
        return Settings(a=sides(A.value), b=sides([B.value or "references"])[0], **values)
    except ConfigError as error:
        raise UsageError(str(error)) from error


def numbers(name: str, texts: list[str] | None, kind: type) -> dict[str, tuple]:
    """A list of numbers of a flag, under the flag's name."""
    from dpojax.config.command_line import UsageError

    if texts is None:
        return {}
    try:
        return {name: tuple(kind(text) for text in texts)}
    except ValueError:
        raise UsageError(f"--{name}={','.join(texts)}: numbers with commas between them") from None


def template_of(name: str | None) -> dict[str, str]:
    """The judge's prompt: a name, or a file."""
    from dpojax import storage

    if name is None:
        return {}
    is_file = "/" in name or "." in name or storage.as_path(name, "--template").is_file()
    return {"template_file" if is_file else "template": name}


def sides(texts: list[str]) -> tuple:
    """The sides that a flag names, with the templates of --prompted."""
    from dpojax.config.command_line import UsageError
    from dpojax.runs.judging_settings import Side

    prompted = {}
    for text in PROMPTED.value:
        name, separator, file = text.partition("=")
        file, colon, shots = file.rpartition(":")
        if not colon or not shots.isdigit():
            file, shots = f"{file}{colon}{shots}", "0"
        if not (separator and name and file):
            raise UsageError(f"--prompted={text}: NAME=FILE or NAME=FILE:SHOTS")
        prompted[name] = {"template": file, "shots": int(shots)}
    named = []
    for text in texts:
        name, separator, policy = text.partition("=")
        if not separator or "/" in name:
            name, policy = "", text
        named.append(Side(policy, name, **prompted.get(name, {})))
    if unknown := prompted.keys() - {s.partition("=")[0] for s in [*A.value, B.value or ""]}:
        raise UsageError(f"--prompted={min(unknown)}=...: no side has this name; --a=NAME=POLICY")
    return tuple(named)


if __name__ == "__main__":
    run_script(main)
