"""Inspects a data set: prints the tokens of a few records, a report on all, and their faults.

    dpojax inspect-data --data FILE --tokenizer FOLDER --max-length 512 \\
        --eval HELD_OUT_FILE --show 3
    dpojax inspect-data --config=FILE --stage=preference --config.preference.data.columns=...

With --config it reads what a training of that config would read. Every key of a config can be set,
also without --config: --config.tokens.empty=keep. A flag such as --max-length is short for a key.

The prompt is dim, chosen green, rejected red; special tokens are inverted; "|" separates tokens; a
newline is shown as ⏎. Tokens of an answer that are not scored (what users and tools say in it) are
dim. Without a terminal, or with NO_COLOR set, special tokens are in ⟦brackets⟧ and tokens that are
not scored in ⟨brackets⟩ instead.

The last table comes from `dpojax.data.lint`. With --strict the exit status is 1 if a record was
dropped, if a field was not read (--columns=-NAME says that it is not wanted), or if that table
counts a fault (longer_chosen and words_disagree are none).
"""

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
from ml_collections import ConfigDict

from dpojax import display, storage
from dpojax.config.command_line import ArgumentParser, UsageError, parse_config_words
from dpojax.config.data_sources import sources_of
from dpojax.config.defaults import default_config
from dpojax.config.help_text import help_width
from dpojax.config.key_help import help_lines
from dpojax.data import lint, records, reviews, sources, tokenise
from dpojax.data.examples import Example, Examples
from dpojax.data.parsing import ParseConfig, parse_rows
from dpojax.data.prompts import EMBEDDED
from dpojax.data.report import Report
from dpojax.data.sources import Source
from dpojax.runs.command import run_command
from dpojax.stages.data import parse_config, tokenize_config
from dpojax.stages.selection import first
from dpojax.stages.tokenizers import load_tokenizer

DIM, GREEN, RED, CYAN, INVERSE, PLAIN, OFF = "2", "32", "31", "36", "7", "", "\x1b[0m"
ESCAPE = re.compile(r"\x1b\[\d*m")  # what `_paint` writes
# Flags that are short for keys; STAGE is the stage whose data are read.
SHORT = {
    "tokenizer": "tokenizer",
    "split": "STAGE.data.split",
    "form": "STAGE.data.form",
    "columns": "STAGE.data.columns",
    "max_length": "tokens.max_length",
    "max_prompt_length": "tokens.max_prompt_length",
    "truncation": "tokens.truncation",
    "assistant_turns": "tokens.assistant_turns",
}


def main(argv: list[str] | None = None) -> int:
    """Print examples, report and lint; return the exit status: 0, 1 (see --strict), 2 (error)."""
    args, config = _arguments(sys.argv[1:] if argv is None else argv)
    try:
        report, findings = _inspect(args, config)
    except (records.DataError, ValueError, OSError) as error:
        display.complain(f"error: {error}")
        return 2
    faulty = report.dropped or report.unread or any(finding.is_fault for finding in findings)
    return 1 if args.strict and faulty else 0


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """The flags, and the config with all that they say of it."""
    words = parse_config_words(argv, _without_limits())
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=_keys_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", nargs="+", help="file, glob, folder or hub name; several files")
    add("--tokenizer", help="Hugging Face folder or hub name")
    add("--config", help="a config file, or the name of a shipped config")
    add("--stage", default="", help="of the config, whose data are read; default: the last")
    add("--split", help="split of a folder or hub data set")
    add("--form", help=f"auto or one of {', '.join(records.FORMS)}")
    add("--columns", help="prompt=question,chosen=answers[0].text,-id: as data.columns")
    add("--scores", action="store_true", help="the loss reads scores: a record has to have them")
    add("--chat-template", help="file with a Jinja chat template")
    add("--max-length", type=int, help="prompt + response, tokens")
    add("--max-prompt-length", type=int)
    add("--truncation", help="drop, cut_prompt_start, ... (tokens.truncation)")
    add("--assistant-turns", choices=("all", "last"))
    add("--eval", nargs="+", help="data that must share no prompt with --data")
    add("--show", type=int, default=3, help="how many examples to print")
    add("--from", dest="first", metavar="ID", help="id of the first example to print (FILE:NUMBER)")
    add("--json", type=storage.as_path, help="also write the report and the lint here")
    add("--strict", action="store_true", help="exit with 1 if a record was dropped or is faulty")
    args = parser.parse_args(words.rest)
    config = words.value
    args.stage = args.stage or _last_with_data(config)
    if not _reads_data(config, args.stage):
        raise UsageError(f"--stage={args.stage}: no stage that reads data")
    if not args.data and not config[args.stage].data.source:
        raise UsageError("--data is missing; name files, or a --config that does")
    for flag, key in SHORT.items():
        if (value := getattr(args, flag)) is not None:
            config.update_from_flattened_dict({key.replace("STAGE", args.stage): value})
    return args, config


def _keys_help() -> str:
    """The keys that decide how data are read, of the stage preference."""
    begins = ("  tokens.", "  preference.data.", "  tokenizer ", "  chat_template ")
    lines, is_listed = [], False
    for line in help_lines(width=help_width()):
        if not line.startswith("      "):  # else it goes on with the key of the line before
            is_listed = line.startswith(begins)
        lines += [line] if is_listed else []
    return "\n".join(["keys, --config.KEY=VALUE:", *lines])


def _last_with_data(config: ConfigDict) -> str:
    names = (name for name in reversed(config.stages) if _reads_data(config, name))
    return next(names, "preference")


def _reads_data(config: ConfigDict, name: str) -> bool:
    stage = config.get(name)
    return isinstance(stage, ConfigDict) and isinstance(stage.get("data"), ConfigDict)


def _inspect(args: argparse.Namespace, config: ConfigDict) -> tuple[Report, list[lint.Finding]]:
    """Read, check and tokenise the data, and print all about it."""
    with tempfile.TemporaryDirectory() as folder:  # for tokenizer = train:SIZE
        tokenizer = load_tokenizer(config, storage.as_path(folder))
    if args.chat_template:
        template = storage.as_path(args.chat_template, "--chat-template")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    settings = tokenize_config(config.tokens)
    data = config[args.stage].data
    parsing = parse_config(data, settings, need_scores=args.scores)
    training = _named(args.data, data.split) or sources_of(data)
    evaluation = _named(args.eval, "") or sources_of(data, evaluation=True)
    for source in [*training, *evaluation]:
        _require_utf8(str(source.path))
    held_out, held_out_report, report = None, Report(), Report()
    if evaluation:
        held_out = parse_rows(sources.read(evaluation), held_out_report, parsing)
    linter = lint.Linter(evaluation=held_out, control_tokens=tokenizer.all_special_tokens)
    if evaluation:
        held_out_report.require_some()
    if training:
        loaded = _records(training, data.limit, report, parsing)
    else:
        rows = _embedded(args.stage, data.limit, config.seed)
        loaded = parse_rows(rows, report, parsing)
    chunks = _linted_chunks(loaded, linter)
    tokenised = tokenise.tokenise_chunks(chunks, tokenizer, settings, report)
    shown = _selected(tokenised, args.first, args.show)
    report.require_some()
    findings = linter.findings()
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for example in shown:
        print(render(example, tokenizer, colour, display.columns(sys.stdout)) + "\n")
    display.say(f"{report}\n\n{lint.table(findings)}")
    if args.json:
        content = json.loads(report.to_json()) | {"lint": [f._asdict() for f in findings]}
        storage.write_json(args.json, content)
    return report, findings


def _without_limits() -> ConfigDict:
    """The config of a command line that names none: all records of --data are read."""
    config = default_config()
    for name in config:
        if _reads_data(config, name):
            config[name].data.update(limit=0, eval_limit=0, source="", eval_source="")
    return config


def _named(paths: list[str] | None, split: str) -> list[Source]:
    """The sources of --data or --eval."""
    return [Source(path, split=split) for path in paths or ()]


def _records(
    listed: list[Source], limit: int, report: Report, parsing: ParseConfig
) -> Iterator[records.Record]:
    """At most `limit` records of each source, as training reads them; 0 is all."""
    names = sources.labels(listed)
    for rows, name in zip(sources.read_each(listed), names):
        yield from first(parse_rows(rows, report, parsing), limit, name, report)


def _embedded(stage: str, count: int, seed: int) -> Iterator[tuple[dict, str]]:
    """The rows of the embedded task that a stage trains on."""
    if stage == "sft":
        rows = [{"text": text} for text in reviews.texts("train", count, seed)]
    else:
        rows = reviews.preferences("train", count, seed)
    for number, row in enumerate(rows, 1):
        yield row, f"{EMBEDDED}/train:{number}"


def _linted_chunks(
    loaded: Iterator[records.Record], linter: lint.Linter
) -> Iterator[list[records.Record]]:
    while chunk := list(itertools.islice(loaded, tokenise.CHUNK)):
        for record in chunk:
            linter.add(record)
        yield chunk


def _selected(chunks: Iterator[Examples], first: str | None, count: int) -> list[Example]:
    """`count` examples from the one with the id `first` on, or from the start; reads all chunks."""
    selected, begun, any_id = [], not first, ""
    for examples in chunks:
        if begun and len(selected) == count:
            continue  # the report is on all of them
        for example in examples:
            any_id = any_id or example.id
            begun = begun or example.id == first
            if begun and len(selected) < count:
                selected.append(example)
    if any_id and not begun:
        raise records.DataError(f"no example has the id {first!r}; ids are like {any_id!r}")
    return selected


def _require_utf8(pattern: str) -> None:
    """Raise DataError with the number of bad lines; reading would stop at the first one."""
    path = storage.as_path(pattern, "the name of a data set")
    for file in [path] if path.exists() else storage.matches(path):
        if file.is_dir() or not file.name.endswith(sources.JSON_SUFFIXES):
            continue
        if lines := lint.not_utf8(file):
            first = ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
            raise records.DataError(
                f"{file}: {len(lines):,} lines are not UTF-8 ({first}); convert the file"
            )


def render(example: Example, tokenizer, colour: bool, width: int = display.UNBROKEN) -> str:
    """Format an example for a terminal: the tokens of the prompt and of each response.

    Args:
      width: columns of the terminal; lines end between two tokens.
    """
    lines = [_paint(example.id, "1", colour)]
    lines.append(_paint(f"prompt ({len(example.prompt):,} tokens)", CYAN, colour))
    lines += _token_lines(tokens(example.prompt, tokenizer, DIM, colour), colour, width)
    names = _names(len(example.responses), example.label)
    masks = example.scored or (None,) * len(names)
    for (name, style), ids, cut, mask in zip(names, example.responses, example.cut, masks):
        note = "" if mask is None or mask.all() else f", {mask.sum():,} scored"
        note += ", end cut off" if cut else ""
        lines.append(_paint(f"{name} ({len(ids):,} tokens{note})", CYAN, colour))
        lines += _token_lines(_answer(ids, mask, tokenizer, style, colour), colour, width)
    return "\n".join(lines)


def _token_lines(texts: Sequence[str], colour: bool, width: int) -> list[str]:
    """Texts of tokens with "|" between them, in indented lines that end after a "|"."""
    bar = _paint("|", DIM, colour)
    lines, free = ["  "], width - 2
    for number, text in enumerate(texts, 1):
        shown = text + bar if number < len(texts) else text
        needed = _columns(shown)
        if needed > free and lines[-1] != "  ":
            lines.append("  ")
            free = width - 2
        lines[-1] += shown
        free -= needed
    return lines


def _columns(text: str) -> int:
    """Columns of a terminal that a text takes; Chinese characters take two."""
    shown = ESCAPE.sub("", text)
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in shown)


def _answer(ids, mask, tokenizer, style: str, colour: bool) -> list[str]:
    """`tokens` of a response; runs of those that are not scored are dim, or in ⟨brackets⟩."""
    if mask is None:
        return tokens(ids, tokenizer, style, colour)
    texts, ends = [], [*np.flatnonzero(np.diff(mask)) + 1, len(ids)]
    for start, end in zip([0, *ends], ends):
        run = tokens(ids[start:end], tokenizer, style if mask[start] else DIM, colour)
        if not (colour or mask[start]):
            run[0], run[-1] = f"⟨{run[0]}", f"{run[-1]}⟩"
        texts += run
    return texts


def _names(count: int, label: bool | None) -> list[tuple[str, str]]:
    """(name, style) of each response."""
    if label is not None:
        return [("desirable", GREEN) if label else ("undesirable", RED)]
    if count == 1:
        return [("response", GREEN)]
    if count == 2:
        return [("chosen", GREEN), ("rejected", RED)]
    return [(f"rank {k}", RED if k == count else GREEN) for k in range(1, count + 1)]


def tokens(ids, tokenizer, style: str, colour: bool) -> list[str]:
    """The texts of tokens.

    N tokens that hold the bytes of one character together are shown as that character and "*N".
    """
    pieces, pending = [], []
    # Tokens are decoded after a letter: some tokenizers remove the space before a text's first one.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = len(tokenizer.decode(anchor))
    special = set(tokenizer.all_special_ids)
    for place, token in enumerate(ids.tolist()):
        if token in special and not pending:
            name = tokenizer.convert_ids_to_tokens(token)
            pieces.append(_paint(name, INVERSE, True) if colour else f"⟦{name}⟧")
            continue
        pending.append(token)
        text = tokenizer.decode(anchor + pending)[before:]
        if text.endswith("\ufffd") and len(pending) < 4 and place + 1 < len(ids):
            continue
        shown = text.replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥").replace("\x1b", "␛")
        shown += f"*{len(pending)}" if len(pending) > 1 else ""
        pieces.append(_paint(shown, style, colour))
        pending = []
    return pieces


def _paint(text: str, style: str, colour: bool) -> str:
    return f"\x1b[{style}m{text}{OFF}" if colour else text


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_command(main)
