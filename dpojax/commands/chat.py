"""Chat: dpojax chat --model=runs/mine [--beside=runs/mine:sft] [--system="Be brief."]

Talks to a model: each line is a message, through the model's chat template, and the reply appears
while it is drawn. A model is a Hugging Face folder (or a name of the hub), or WORKDIR[:STAGE] of a
run of `dpojax train`. With --beside a second model answers the same messages in a second column.

    /again          another reply to the last message
    /clear          begin a new dialogue
    /temperature T  how replies are drawn from now on; 0 is greedy
    /help, /quit    this list; the end

Ctrl-C stops a reply, and Ctrl-D ends. Without a terminal every line of standard input gets one line
on standard output, where a newline is written \\n; with --beside a tab separates the two replies.
"""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Iterator
from typing import NoReturn

from absl import flags

from dpojax import display
from dpojax.config.command_line import UsageError
from dpojax.runs.command import run_script

MODEL = flags.DEFINE_string("model", None, "The model that answers.", required=True)
BESIDE = flags.DEFINE_string(
    "beside", "", "A second model that answers as well, such as the reference."
)
SYSTEM = flags.DEFINE_string("system", "", "The system message of each dialogue.")
TEMPLATE = flags.DEFINE_bool("template", True, "Use the chat template; else lines are prompts.")
NEW = flags.DEFINE_integer("max_new_tokens", 256, "The longest reply.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy.", lower_bound=0)
TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k likeliest tokens; 0: all.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens of this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of all replies.", lower_bound=0)
QUIT = ("/quit", "/exit", "/q")


def main() -> None:
    if not 0 < TOP_P.value <= 1:
        raise UsageError(f"--top_p={TOP_P.value}: above 0 and at most 1 is expected")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        print("loading", MODEL.value, BESIDE.value, flush=True)
    from dpojax.runs.chat import ChatSettings, Dialogue, describe, require_template
    from dpojax.runs.policy import load_policy
    from dpojax.stopping import interrupts_raise

    settings = ChatSettings(
        max_new_tokens=NEW.value,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        system=SYSTEM.value,
        template=TEMPLATE.value,
    )
    names = [name for name in (MODEL.value, BESIDE.value) if name]
    dialogues = [Dialogue(load_policy(name), settings) for name in names]
    for name, dialogue in zip(names, dialogues):
        require_template(name, dialogue)
    if on_terminal:
        for name, dialogue in zip(names, dialogues):
            print(textwrap.fill(describe(name, dialogue), display.columns(sys.stdout)))
        print("/help lists the commands, Ctrl-D ends", flush=True)
    with interrupts_raise() if on_terminal else contextlib.nullcontext():
        _talk(names, dialogues, on_terminal)


def _talk(names: list[str], dialogues: list, on_terminal: bool) -> None:
    """Answer line after line, until there are no more."""
    for line in _lines(on_terminal):
        text = line.strip()
        if text in QUIT:
            return
        try:
            if text.startswith("/"):
                replies = _obey(text, dialogues)
            else:
                replies = [dialogue.reply(text) for dialogue in dialogues] if text else []
            if on_terminal:
                _show(names, dialogues, replies)
            else:
                _print_line(replies, text)
        except ValueError as error:  # a message that does not fit, a command that is none
            print(f"[{error}]" if on_terminal else "", flush=True)
            if not on_terminal:
                print(f"chat: {error}", file=sys.stderr, flush=True)


def _lines(on_terminal: bool) -> Iterator[str]:
    """The lines of standard input; on a terminal after a prompt, with a history."""
    if not on_terminal:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # some builds of Python are without it
        import readline  # noqa: F401  input() then has a history and keys to edit the line

    display.hide()  # or its lines would be drawn where the user types
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:  # the line is thrown away, as in a shell
            print("^C (Ctrl-D ends)")
        except EOFError:
            print()
            return


def _obey(text: str, dialogues: list) -> list[Iterator[str]]:
    """Do what a command says; return the replies that it asks for.

    Raises:
      ValueError: there is no such command, or it cannot be done now.
    """
    command, _, argument = text.partition(" ")
    if command == "/again":
        return [dialogue.again() for dialogue in dialogues]
    if command == "/clear":
        for dialogue in dialogues:
            dialogue.clear()
    elif command == "/help":
        commands = next(part for part in __doc__.split("\n\n") if part.startswith("    /"))
        print(f"{commands}\n    Ctrl-C stops a reply, Ctrl-D ends")
    elif command == "/temperature":
        try:
            temperature = float(argument)
        except ValueError:
            temperature = -1.0
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"/temperature {argument}: a number from 0 on is expected")
        for dialogue in dialogues:
            dialogue.settings = dialogue.settings._replace(temperature=temperature)
    else:
        raise ValueError(f"{command}: no such command; /help lists them")
    return []


def _show(names: list[str], dialogues: list, replies: list[Iterator[str]]) -> None:
    """Print one reply piece by piece, or two in columns; Ctrl-C stops them."""
    from dpojax.tables import side_by_side

    width = display.columns(sys.stdout)
    if replies and not any(dialogue.draws for dialogue in dialogues):
        print("[compiling; later replies come sooner]", flush=True)
    try:
        if len(replies) == 1:
            begun = False
            for piece in replies[0]:
                piece = piece if begun else piece.lstrip()
                begun = begun or bool(piece)
                print(piece, end="", flush=True)
            print()
        elif replies:
            texts = ["".join(reply).strip() for reply in replies]
            print(side_by_side(names, width))
            print(side_by_side(texts, width))
    except KeyboardInterrupt:
        for reply in replies:
            reply.close()
        print("\n[stopped]")
    if replies and (count := max(dialogue.forgotten for dialogue in dialogues)):
        what = "exchange no longer fits" if count == 1 else f"{count} exchanges no longer fit"
        print(f"[the first {what}; later replies are given without]")


def _print_line(replies: list[Iterator[str]], text: str) -> None:
    """Print the replies to one message as one line; an empty message gets an empty line."""
    from dpojax.runs.chat import one_line

    if replies or not text:
        print("\t".join(one_line("".join(reply)) for reply in replies), flush=True)


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main)
