"""Forms of two responses: stated pairs, dialogues as text, and two answers with a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpojax.data.records import dialogues
from dpojax.data.records.fields import Fields, as_number, as_truth
from dpojax.data.records.instructions import prompt_of
from dpojax.data.records.record import (
    Content,
    DataError,
    Messages,
    Record,
    RecordError,
    listed,
    make_record,
)
from dpojax.data.records.singles import ARTICLE_TEMPLATE

HH_SEPARATOR = "\n\nAssistant:"
AUTHOR = "ref"  # the policy of Stiennon et al. that wrote the post, and a summary below it
TLDR_TEMPLATE = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"

# Names of the better and the worse answer, and of their prompt. The first that a row has is read.
ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),  # stack-exchange-paired
)
PROMPTS = (
    "prompt",
    "question",
    "query",
    "conversations",
    "conversation",
    "messages",
    "instruction",
    "context",
    "input",
)

# Names of two answers of which a verdict says which is better, and of their prompt.
TWO_ANSWERS = (
    ("response_a", "response_b"),
    ("conversation_a", "conversation_b"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
    ("response_0", "response_1"),  # PKU-SafeRLHF
    ("answer_0", "answer_1"),  # webgpt_comparisons
    ("response1", "response2"),  # HelpSteer3
    ("response_1", "response_2"),  # HelpSteer2
    ("output_1", "output_2"),  # AlpacaFarm
    ("human_ref_A", "human_ref_B"),  # SHP
)
JUDGED_PROMPTS = ("prompt", "question", "instruction", "context", "history", "input")
FIRST_ANSWERS = {names[0] for names in TWO_ANSWERS}
TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad", "both", "equal", "same")


def answers_of(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Names of the better and the worse answer if the row has one of them, else None."""
    return next((names for names in ANSWERS if any(name in row for name in names)), None)


def pair(fields: Fields) -> Record:
    better, worse = answers_of(fields.row) or ANSWERS[0]
    chosen, rejected = fields.content(better), fields.content(worse)
    if isinstance(chosen, str) != isinstance(rejected, str):
        kind = "text" if isinstance(chosen, str) else "a list of messages"
        raise fields.error(worse, f"{kind}, as in {better!r}")
    scores = fields.scores()
    if isinstance(chosen, str):
        prompt = prompt_of(fields, PROMPTS)
        return make_record(fields.id, prompt, (chosen, rejected), scores=scores)
    for name, messages in ((better, chosen), (worse, rejected)):
        dialogues.require_answer(messages, fields.where(name))
    name = fields.first(PROMPTS)
    whole = [
        dialogues.opens_dialogue(answer) or (name is None and dialogues.has_prompt(answer))
        for answer in (chosen, rejected)
    ]
    if all(whole):
        stated = fields.content("prompt") if fields.has("prompt") else None
        return _split(fields.id, chosen, rejected, stated, scores=scores)
    if name is None:
        raise RecordError(
            f"{fields.id}: {better!r} and {worse!r} are answers, but there is no prompt: name its "
            "field (data.columns=prompt=NAME), or give whole dialogues",
            "no_prompt",
        )
    if any(whole):
        raise _prompts_differ(fields.id)
    return make_record(fields.id, prompt_of(fields, PROMPTS), (chosen, rejected), scores=scores)


def _prompts_differ(id: str) -> RecordError:
    return RecordError(f"{id}: the two answers belong to different prompts", "prompts_differ")


def _split(
    id: str, first: Messages, second: Messages, stated: Content | None, **fields: Any
) -> Record:
    """Split two dialogues where they part: before it is the prompt, after it are the answers.

    They answer different prompts if nothing is common, or if they part at a turn of the user or
    the system.
    """
    shared = dialogues.common_start(first, second)
    prompt, answers = first[:shared], (first[shared:], second[shared:])
    if shared == 0 or any(dialogues.opens_dialogue(answer) for answer in answers):
        raise _prompts_differ(id)
    if stated is not None and not _is_prompt(stated, prompt):
        raise RecordError(
            f"{id}: field 'prompt' is not the start of the dialogues; if they hold all of it, "
            "leave the field out: data.columns=-prompt",
            "prompt_not_in_dialogue",
        )
    return Record(id, prompt, answers, **fields)


def _is_prompt(stated: Content, common: Messages) -> bool:
    """Whether the prompt field agrees with the common start of the dialogues."""
    if isinstance(stated, str):
        return any(stated.strip() == (message["content"] or "").strip() for message in common)
    if stated[0]["role"] != "system" and common[0]["role"] == "system":
        common = common[1:]
    return dialogues.same_messages(stated, common[: len(stated)])


def hh(fields: Fields) -> Record:
    halves = []
    for name in PROMPTS:
        if name in fields.row and not fields.has(name):
            raise fields.error(name, "text or messages")
    for name in ("chosen", "rejected"):
        head, separator, answer = fields.text(name).rpartition(HH_SEPARATOR)
        if not separator:
            raise RecordError(
                f"{fields.where(name)} should be a dialogue with {HH_SEPARATOR!r} in it "
                "(form hh); if it is an answer alone, give its prompt in a field 'prompt' "
                f"(data.columns=prompt=NAME); the record has {listed(fields.row)}",
                "no_prompt",
            )
        halves.append((head + separator, answer))
    (prompt, chosen), (other_prompt, rejected) = halves
    if prompt != other_prompt:
        raise _prompts_differ(fields.id)
    return Record(fields.id, prompt, (chosen, rejected), scores=fields.scores())


def comparison(fields: Fields) -> Record:
    """Stiennon et al. 2020, with a post of Reddit or an article of CNN/DailyMail."""
    prompt, texts, choice = read_comparison(fields)
    return Record(fields.id, prompt, (texts[choice], texts[1 - choice]))


def read_comparison(fields: Fields) -> tuple[str, tuple[str, str], int]:
    """The prompt, the two summaries in their order, and the index of the better one."""
    info = fields.inside("info")
    if info.has("article"):
        prompt = ARTICLE_TEMPLATE.format(article=info.text("article"))
    else:
        names = ("subreddit", "title", "post")
        prompt = TLDR_TEMPLATE.format(**{name: info.text(name) for name in names})
    summaries = fields.items("summaries", 2)
    if len(summaries) != 2:
        raise fields.error("summaries", "two summaries")
    choice = None if isinstance(fields["choice"], bool) else as_number(fields["choice"])
    if choice not in (0, 1):
        raise fields.error("choice", "0 or 1, the index of the better summary", "bad_verdict")
    both = fields.parts("summaries", summaries)
    first, second = (both.inside(name).text("text") for name in ("0", "1"))
    return prompt, (first, second), int(choice)


def author_summary(row: Mapping[str, Any]) -> str:
    """Of a row of Stiennon et al. the summary by the post's author; "" where there is none."""
    summaries = row.get("summaries")
    for summary in summaries if isinstance(summaries, list | tuple) else ():
        if isinstance(summary, Mapping) and summary.get("policy") == AUTHOR:
            return str(summary.get("text") or "")
    return ""


def has_verdict(row: Mapping[str, Any]) -> bool:
    """Whether a row has two answers and says which is better."""
    names = _two_answers(row)
    return names is not None and _verdict_field(row, names) is not None


def judged(fields: Fields) -> Record:
    """Two answers with a verdict. A tie is a record of two equal ranks."""
    names = _two_answers(fields.row)
    if names is None:
        raise DataError(
            f"{fields.id}: form judged needs two answers, such as response_a, response_b"
        )
    field = _verdict_field(fields.row, names)
    if field is None:
        raise fields.error("winner", "the name of the better answer")
    read_verdict = VERDICTS.get(field, _by_scores)
    preference = read_verdict(fields, field, names)  # above 0: the second is better
    scores = _scores_of(fields, names, preference)
    first, second = _turns(fields, names) or tuple(fields.content(name) for name in names)
    order = (1, 0) if preference > 0 else (0, 1)
    answers = [(first, second)[place] for place in order]
    extra = {
        "scores": None if scores is None else tuple(scores[place] for place in order),
        "rank": (0, 0) if preference == 0 else None,
    }
    if isinstance(first, str) or not dialogues.opens_dialogue(first):
        return make_record(fields.id, _prompt(fields), answers, **extra)
    for name, messages in zip(names, (first, second)):
        dialogues.require_answer(messages, fields.where(name))
    return _split(fields.id, *answers, None, **extra)


def _two_answers(row: Mapping[str, Any]) -> tuple[str, str] | None:
    if row.keys().isdisjoint(FIRST_ANSWERS):
        return None
    return next((names for names in TWO_ANSWERS if all(name in row for name in names)), None)


def _prompt(fields: Fields) -> Content:
    """The prompt; an object holds its text in `full_text` (webgpt_comparisons) or `text`."""
    name = fields.first(JUDGED_PROMPTS) or "prompt"
    if isinstance(fields[name], Mapping) and not fields[name].get("role"):
        inside = fields.inside(name)
        return inside.text(inside.first(("full_text", "text")) or "text")
    return prompt_of(fields, JUDGED_PROMPTS)


def _turns(fields: Fields, names: tuple[str, str]) -> tuple[Messages, Messages] | None:
    """Dialogues of prompt and answers that are lists of texts, one a turn (Chatbot Arena's CSV)."""
    turn_lists = [
        dialogues.unpack_json(value) if isinstance(value, str) else value
        for value in (fields.row.get(name) for name in ("prompt", *names))
    ]
    if not all(isinstance(x, list | tuple) for x in turn_lists) or any(
        isinstance(turn, Mapping) for x in turn_lists for turn in x
    ):
        return None
    if not all(isinstance(turn, str) for x in turn_lists for turn in x):
        raise RecordError(f"{fields.id}: a turn of prompt or answers is no text", "field_type")
    if not turn_lists[0] or len({len(x) for x in turn_lists}) != 1:
        counts = ", ".join(str(len(x)) for x in turn_lists)
        raise RecordError(
            f"{fields.id}: prompt and answers have {counts} turns; each needs as many", "field_type"
        )
    for name in ("prompt", *names):
        fields[name]
    users, *answers = turn_lists
    for text in (text for texts in turn_lists for text in texts):
        dialogues.require_unicode(text, fields.id)
    roles = ("user", "assistant")
    turns = [
        tuple(
            {"role": role, "content": text}
            for two in zip(users, texts)
            for role, text in zip(roles, two)
        )
        for texts in answers
    ]
    return turns[0], turns[1]


def _verdict_field(row: Mapping[str, Any], names: tuple[str, str]) -> str | None:
    """The field that says which answer is better, which may be the score of the first; or None."""
    verdicts = [name for name in VERDICTS if name in row]
    if verdicts:
        return next((name for name in verdicts if row[name] is not None), verdicts[0])
    scores = _score_names(names)
    return scores[0] if all(name in row for name in scores) else None


# These read a verdict: a number that is above 0 if the second answer is better.


def _by_scores(fields: Fields, field: str, names: tuple[str, str]) -> float:
    first, second = (fields.number(name) for name in _score_names(names))
    return second - first


def _score_names(names: tuple[str, str]) -> tuple[str, ...]:
    return tuple(f"score_{_suffix(name)}" for name in names)


def _suffix(name: str) -> str:
    """`a` of `response_a`, `1` of `response1`."""
    return name[-1]


def _by_name(fields: Fields, field: str, names: tuple[str, str]) -> float:
    """The winner by the name of its field, or by what the name ends with."""
    winner = str(fields[field]).strip().lower()
    if winner in TIES:
        return 0.0
    for sign, name in ((-1.0, names[0]), (1.0, names[1])):
        suffix = _suffix(name).lower()
        if winner in (
            name.lower(),
            suffix,
            f"model_{suffix}",
            f"assistant_{suffix}",
            f"{suffix}.0",
        ):
            return sign
    expected = f"the better answer ({names[0]}, {names[1]}, model_a, model_b, ...) or tie"
    raise fields.error(field, expected, "bad_verdict")


def _one_hot(fields: Fields, field: str, names: tuple[str, str]) -> float:
    flags = {}
    for name in ("winner_model_a", "winner_model_b", "winner_tie"):
        flags[name] = as_truth(fields[name]) if fields.has(name) else False
        if flags[name] is None:
            raise fields.error(name, "1 or 0", "bad_verdict")
    if sum(flags.values()) != 1:
        raise fields.error(
            field, "1 in exactly one of winner_model_a, winner_model_b, winner_tie", "bad_verdict"
        )
    return float(flags["winner_model_b"]) - float(flags["winner_model_a"])


def _by_index(fields: Fields, field: str, names: tuple[str, str]) -> float:
    index = as_number(fields[field])
    if index not in (0, 1):
        raise fields.error(field, "0 or 1, the index of the better answer", "bad_verdict")
    return 2 * index - 1


def _first_is_one(fields: Fields, field: str, names: tuple[str, str]) -> float:
    return -_by_index(fields, field, names)


def _by_sign(fields: Fields, field: str, names: tuple[str, str]) -> float:
    return fields.number(field, "a number, below 0 if the first answer is better", "bad_verdict")


VERDICTS = {
    "winner": _by_name,
    "winner_model_a": _one_hot,
    "better_response_id": _by_index,
    "safer_response_id": _by_index,
    "overall_preference": _by_sign,  # HelpSteer3: -3 (the first is much better) to 3
    "preference_strength": _by_sign,  # HelpSteer2
    "preference": _by_name,
    "labels": _first_is_one,  # SHP: 1 if A is better
}


def _scores_of(
    fields: Fields, names: tuple[str, str], preference: float
) -> tuple[float, float] | None:
    """The scores of both answers; of a strength the difference."""
    if all(name in fields.row for name in _score_names(names)):
        return fields.optional_numbers(_score_names(names))
    if any(fields.was_read(name) for name in ("overall_preference", "preference_strength")):
        return (0.0, preference)
    return None
