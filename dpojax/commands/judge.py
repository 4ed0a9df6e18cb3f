"""Judge: dpojax judge --a=runs/dpo --b=references --prompts=pairs.jsonl \\
    --judge=openai:MODEL@URL --out=judged

Draws responses of policies to prompts, asks a judge in both orders which of two is better, and
writes win rates with 95 % intervals: OUT/report.md, win_rates.csv, win_rates.png and .pdf, and
samples.jsonl. The same command again draws and asks only what is missing.

A side (--a, which may be repeated, and --b) is a hub name, a Hugging Face folder, WORKDIR[:STAGE]
of a run, a file of responses (`prompt` or `id`, and `response` in each record), or "references",
the chosen responses of the prompts. NAME=SIDE names it in tables.

A finished frontier needs no more than its folder: it is judged by its true reward against the SFT
policy, each method by its run with the highest reward, or by that nearest to --at_kl:
    dpojax judge --frontier=runs/frontier

A judge that is compared with people:
    dpojax judge --humans=comparisons.jsonl --judge=length
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, NoReturn

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

JUDGE = TEXTS(
    "judge",
    [],
    "exact, length, reward_model:, classifier:, sbert:, sbert_prompt:, local:, openai:MODEL@URL.",
)
TEXT("template", None, "The judge's prompt: summary, concise, helpful, instruction, or a file.")
NUMBER("tie", None, "Judges that score: scores at most so far apart are a tie.")
NUMBER("repeat", None, "Share of questions that are asked twice; default: 0.05.")
COUNT("judge_batch_size", None, "Texts that a local judge reads at a time.")
NUMBER("max_cost", None, "Stop asking before this is paid, in the currency of the prices.")
ENDPOINT = [
    NUMBER("price_in", None, "Of a million tokens that the endpoint reads."),
    NUMBER("price_out", None, "Of a million tokens that the endpoint writes."),
    COUNT("concurrency", None, "Requests to the endpoint at a time; default: 8."),
    NUMBER("requests_per_minute", None, "Most requests to it."),
]
MORE = TEXTS("endpoint", [], "NAME=VALUE: another option of it, such as key_variable=HF_TOKEN.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only count calls, tokens and cost; draw nothing.")
EXPORT = TEXT("export_batch", None, "A folder: write the open questions as batch files there.")
IMPORT = TEXTS("import_batch", [], "A file of replies to batch files; may be repeated.")

TEMPERATURES = flags.DEFINE_list(
    "temperatures", None, "Of the responses of a, such as 0,0.25,0.5,0.75,1; default: 1."
)
NUMBER("b_temperature", None, "Of those of b; default: that of the a it is compared with.")
BEST_OF = flags.DEFINE_list("best_of", None, "The best of so many responses by a reward: 1,16,128.")
TEXT("best_of_reward", None, "reviews, classifier:FOLDER[:LABEL], reward_model:FOLDER.")
COUNT("samples", None, "Responses of each side to each prompt; default: 1.")
COUNT("max_new_tokens", None, "Tokens of the longest response; default: 64.")
TEXT("stop_text", None, "A response ends before this text.")
PROMPTED = TEXTS("prompted", [], "NAME=FILE[:SHOTS]: the side NAME reads prompts in this template.")
TEXT("examples", None, "Data whose first records are the examples of few-shot prompting.")
COUNT("batch_size", None, "Responses that are drawn at a time.")
COUNT("seed", None, "Of prompts, responses and intervals.")
NUMBER("hang_minutes", None, "Without progress, after which it ends; default: 30; 0: never.")
TEXT("responses", None, "Folder that keeps responses, for several calls; default: OUT/responses.")
TEXT("verdicts", None, "Folder that keeps verdicts, for several calls; default: OUT/verdicts.")

# The settings that --humans reads: the comparisons are there, and nothing is drawn.
OF_HUMANS = {"out", "judge", "template", "tie", "judge_batch_size", "endpoint"}
OF_HUMANS |= {"max_cost", "seed", "verdicts", "hang_minutes"}


def main() -> int:
    from dpojax import display
    from dpojax.config.command_line import UsageError
    from dpojax.runs import judging

    if HUMANS.value is not None:
        return compare_with_humans()
    settings = read_settings()
    if DRY_RUN.value and (EXPORT.value or IMPORT.value):
        raise UsageError(
            "--dry_run: makes and reads no batch files; leave out --export_batch and --import_batch"
        )
    if DRY_RUN.value:
        print(judging.estimate_cost(settings, log=tell))
        return 0
    if IMPORT.value:
        tell(str(judging.import_replies(settings, IMPORT.value, log=tell)))
    if EXPORT.value:
        files = judging.export_questions(settings, EXPORT.value, log=tell)
        print("\n".join(map(str, files)) or "every question has its reply: nothing is written")
        return 0
    display.say(judging.terminal_table(judging.judge(settings, log=tell)))
    files = "report.md, win_rates.csv, win_rates.png, win_rates.pdf, samples.jsonl"
    print(f"\n{settings.out}: {files}")
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

    values = set_flags() | numbers("temperatures", TEMPERATURES.value, float)
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
    required = {"a": A.value, "prompts": values.get("prompts"), "judge": JUDGE.value}
    if missing := [f"--{name}" for name, value in required.items() if not value]:
        raise UsageError(f"{', '.join(missing)}: missing (or --frontier=FOLDER)")
    values.setdefault("out", "judged")
    try:
        return Settings(a=sides(A.value), b=sides([B.value or "references"])[0], **values)
    except ConfigError as error:
        raise UsageError(str(error)) from error


def set_flags() -> dict[str, Any]:
    """The settings whose flags are on the command line, as they stand there."""
    from dpojax.config.command_line import UsageError
    from dpojax.evaluation.judging.endpoint_options import parse_options
    from dpojax.runs.judging_settings import Settings

    names = {field.name for field in dataclasses.fields(Settings)}
    names -= {"a", "b", "judge", "endpoint", "temperatures", "best_of"}
    values = {
        name: flags.FLAGS[name].value
        for name in names & set(flags.FLAGS)
        if flags.FLAGS[name].value is not None
    }
    if len(JUDGE.value) > 1 and HUMANS.value is None:
        raise UsageError("--judge: several judges are compared by --humans; name one")
    values |= {"judge": JUDGE.value[0]} if JUDGE.value else {}
    options = {flag.name: flag.value for flag in ENDPOINT if flag.value is not None}
    return values | {"endpoint": options | parse_options(MORE.value)}


def compare_with_humans() -> int:
    """Ask each judge about comparisons that people have made, and print how they agree."""
    from dpojax import storage
    from dpojax.config.command_line import UsageError
    from dpojax.evaluation.judging import human_report, human_study
    from dpojax.evaluation.judging.asking import estimate
    from dpojax.evaluation.judging.humans import read_humans
    from dpojax.runs import judging
    from dpojax.runs.judging_settings import Settings, Side
    from dpojax.watchdog import watching

    values = {"out": "judged"} | set_flags()
    other = (A, B, FRONTIER, AT_KL, METHODS, EXPORT, IMPORT, TEMPERATURES, BEST_OF, PROMPTED)
    unread = values.keys() - OF_HUMANS | {flag.name for flag in other if flag.present}
    if unread:
        names = ", ".join(f"--{name}" for name in sorted(unread))
        raise UsageError(f"--humans: asks about the file's comparisons, and reads no {names}")
    if not JUDGE.value:
        raise UsageError("--humans: needs --judge, one or more")
    values |= template_of(values.pop("template", None))
    values |= {"prompts": HUMANS.value, "a": (Side(HUMANS.value),)}
    settings = Settings(**values | {"judge": JUDGE.value[0]})
    out = storage.as_path(settings.out, "--out")
    with watching(settings.hang_minutes):
        humans = read_humans(HUMANS.value)
        judges = [
            judging.open_settings_judge(dataclasses.replace(settings, judge=spec))
            for spec in JUDGE.value
        ]
        if DRY_RUN.value:
            comparisons = [human.comparison for human in humans]
            with judging.open_verdicts(settings) as cache:
                for judge in judges:
                    print(f"{judge.name}: {estimate(judge, comparisons, cache, repeat=0)}")
            return 0
        with storage.lock_in_turn(out, tell), judging.open_verdicts(settings) as cache:
            study = human_study.human_agreement(
                judges,
                humans,
                cache=cache,
                max_cost=settings.max_cost,
                resamples=settings.resamples,
                seed=settings.seed,
            )
            human_report.write(out, study, {"file": HUMANS.value})
    print("\n".join(human_study.table(study)))
    print(f"\n{settings.out}: agreement.md, agreement.csv, agreement.png, agreement.pdf")
    return 0


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


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main)
