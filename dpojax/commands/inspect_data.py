"""Inspects a data set: prints the tokens of a few records, a report on all, and their faults.

    dpojax inspect-data --data FILE --tokenizer FOLDER --max-length 512 \\
        --eval HELD_OUT_FILE --show 3

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
import sys
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

from dpojax import storage
from dpojax.config.command_line import ArgumentParser
from dpojax.data import lint, records, sources, tokenise
from dpojax.data.examples import Example, Examples
from dpojax.data.parsing import ParseConfig, parse_rows
from dpojax.data.report import Report
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.data.tokenizer_files import read_tokenizer
from dpojax.runs.command import run_command

DIM, GREEN, RED, CYAN, INVERSE, PLAIN, OFF = "2", "32", "31", "36", "7", "", "\x1b[0m"


def main(argv: list[str] | None = None) -> int:
    """Print examples, report and lint; return the exit status: 0, 1 (see --strict), 2 (error)."""
    args = _arguments(argv)
    try:
        report, findings = _inspect(args)
    except (records.DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    faulty = report.dropped or report.unread or any(finding.is_fault for finding in findings)
    return 1 if args.strict and faulty else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    default = TokenizeConfig()
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, nargs="+", help="file, glob, folder or hub name; several files")
    add("--tokenizer", required=True, help="Hugging Face folder or hub name")
    add("--split", help="split of a folder or hub data set")
    add("--form", default="auto", help=f"auto or one of {', '.join(records.FORMS)}")
    add("--columns", default="", help="prompt=question,chosen=answers[0].text,-id: as data.columns")
    add("--scores", action="store_true", help="the loss reads scores: a record has to have them")
    add("--chat-template", help="file with a Jinja chat template")
    add("--max-length", type=int, default=default.max_length, help="prompt + response, tokens")
    add("--max-prompt-length", type=int, default=default.max_prompt_length)
    add(
        "--truncation",
        default=default.truncation,
        help="drop, cut_prompt_start, ... (TokenizeConfig)",
    )
    add("--assistant-turns", default=default.assistant_turns, choices=("all", "last"))
    add("--eval", nargs="+", help="data that must share no prompt with --data")
    add("--show", type=int, default=3, help="how many examples to print")
    add("--from", dest="first", metavar="ID", help="id of the first example to print (FILE:NUMBER)")
    add("--json", type=storage.as_path, help="also write the report and the lint here")
    add("--strict", action="store_true", help="exit with 1 if a record was dropped or is faulty")
    return parser.parse_args(argv)


def _inspect(args: argparse.Namespace) -> tuple[Report, list[lint.Finding]]:
    """Read, check and tokenise the data, and print all about it."""
    tokenizer = read_tokenizer(args.tokenizer)
    if args.chat_template:
        template = storage.as_path(args.chat_template, "--chat-template")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    config = TokenizeConfig(
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        truncation=args.truncation,
        assistant_turns=args.assistant_turns,
    )
    for pattern in args.data + (args.eval or []):
        _require_utf8(pattern)
    parsing = ParseConfig(
        args.form, records.read_columns(args.columns), args.scores, args.assistant_turns == "last"
    )
    held_out, held_out_report, report = None, Report(), Report()
    if args.eval:
        held_out = parse_rows(sources.read(_one(args.eval)), held_out_report, parsing)
    linter = lint.Linter(evaluation=held_out, control_tokens=tokenizer.all_special_tokens)
    if args.eval:
        held_out_report.require_some()
    rows = sources.read(_one(args.data), split=args.split)
    chunks = _linted_chunks(parse_rows(rows, report, parsing), linter)
    tokenised = tokenise.tokenise_chunks(chunks, tokenizer, config, report)
    shown = _selected(tokenised, args.first, args.show)
    report.require_some()
    findings = linter.findings()
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for example in shown:
        print(render(example, tokenizer, colour) + "\n")
    print(f"{report}\n\n{lint.table(findings)}")
    if args.json:
        content = json.loads(report.to_json()) | {"lint": [f._asdict() for f in findings]}
        storage.write_json(args.json, content)
    return report, findings


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


def _one(paths: list[str]) -> str | list[str]:
    return paths[0] if len(paths) == 1 else paths


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


def render(example: Example, tokenizer, colour: bool) -> str:
    """Format an example for a terminal: the tokens of the prompt and of each response."""
    lines = [_paint(example.id, "1", colour)]
    lines.append(_paint(f"prompt ({len(example.prompt):,} tokens)", CYAN, colour))
    lines.append("  " + tokens(example.prompt, tokenizer, DIM, colour))
    names = _names(len(example.responses), example.label)
    masks = example.scored or (None,) * len(names)
    for (name, style), ids, cut, mask in zip(names, example.responses, example.cut, masks):
        note = "" if mask is None or mask.all() else f", {mask.sum():,} scored"
        note += ", end cut off" if cut else ""
        lines.append(_paint(f"{name} ({len(ids):,} tokens{note})", CYAN, colour))
        lines.append("  " + _answer(ids, mask, tokenizer, style, colour))
    return "\n".join(lines)


def _answer(ids, mask, tokenizer, style: str, colour: bool) -> str:
    """The tokens of a response; runs of those that are not scored are dim, or in ⟨brackets⟩."""
    if mask is None:
        return tokens(ids, tokenizer, style, colour)
    runs, ends = [], [*np.flatnonzero(np.diff(mask)) + 1, len(ids)]
    for start, end in zip([0, *ends], ends):
        run = tokens(ids[start:end], tokenizer, style if mask[start] else DIM, colour)
        runs.append(run if colour or mask[start] else f"⟨{run}⟩")
    return _paint("|", DIM, colour).join(runs)


def _names(count: int, label: bool | None) -> list[tuple[str, str]]:
    """(name, style) of each response."""
    if label is not None:
        return [("desirable", GREEN) if label else ("undesirable", RED)]
    if count == 1:
        return [("response", GREEN)]
    if count == 2:
        return [("chosen", GREEN), ("rejected", RED)]
    return [(f"rank {k}", RED if k == count else GREEN) for k in range(1, count + 1)]


def tokens(ids, tokenizer, style: str, colour: bool) -> str:
    """The texts of tokens with "|" between them.

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
    return _paint("|", DIM, colour).join(pieces)


def _paint(text: str, style: str, colour: bool) -> str:
    return f"\x1b[{style}m{text}{OFF}" if colour else text


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_command(main)
