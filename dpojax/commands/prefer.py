"""Preferences: dpojax prefer --policy=runs/reviews:sft --prompts=reviews --limit=1000 \\
    --reward=reviews --out=pairs

Draws completions of every prompt from a policy, scores them by a reward, and writes pairs (or
ranked lists) as Parquet, for --config.preference.data.source=pairs. The same command again makes
what is missing; several processes share the work (--process=0/4 where JAX does not count them
itself).
"""

from __future__ import annotations

from typing import NoReturn

from absl import flags

from dpojax.runs.command import run_script

TEXT = flags.DEFINE_string
NUMBER, COUNT = flags.DEFINE_float, flags.DEFINE_integer

TEXT("policy", None, "Hugging Face folder, hub name or WORKDIR[:STAGE].", required=True)
TEXT(
    "prompts",
    None,
    "reviews, .txt, a data set with a field prompt, prefixes:SOURCE[@SPLIT].",
    required=True,
)
TEXT(
    "reward",
    None,
    "reviews[:log_odds], classifier:FOLDER[:LABEL], reward_model:FOLDER.",
    required=True,
)
TEXT("out", None, "The folder to write, or to go on with.", required=True)
TEXT("split", "train", "Of the prompts of reviews: train or eval.")
COUNT("skip", 0, "Prompts to leave out first.")
COUNT("limit", 0, "Prompts behind those; 0 is all.")
COUNT("completions", 4, "Of each prompt.")
TEXT("pairs", "all", "all, best_worst or ranked.")
TEXT("labels", "deterministic", "deterministic or bradley_terry.")
NUMBER("label_temperature", 1.0, "bradley_terry: what score differences are divided by.")
NUMBER("tie", 1e-9, "deterministic: scores at most so far apart are a tie.")
NUMBER("temperature", 1.0, "Of sampling.")
COUNT("top_k", 0, "Only the k likeliest tokens; 0: all.")
NUMBER("top_p", 1.0, "Only the likeliest tokens of this probability.")
COUNT("max_new_tokens", 64, "The longest completion.")
TEXT("truncated", "keep", "Completions that were cut there: keep or drop.")
flags.DEFINE_bool("fixed_length", False, "Completions that are all cut are no error.")
COUNT("batch_size", 64, "Prompts at a time.")
COUNT("shard_size", 1024, "Prompts of a file.")
COUNT("seed", 0, "Of prompts, completions and labels.")
NUMBER("hang_minutes", 30.0, "Without progress, after which the command ends; 0: never.")
PROCESS = TEXT("process", "", "INDEX/COUNT; as JAX counts by default.")


def main() -> None:
    import dataclasses

    from dpojax import display
    from dpojax.runs.preferences import (
        Settings,
        counts_text,
        generate_preferences,
        parse_process,
    )

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: flags.FLAGS[name].value for name in names})
    made = generate_preferences(settings, process=parse_process(PROCESS.value), log=display.say)
    if made["counts"] is None:
        display.say(f"{settings.out}: other processes are still at work")
    else:
        counts = counts_text(made["counts"])
        display.say(f"{settings.out}: {counts}; mean score {made['mean_score']:.4f}")


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main)
