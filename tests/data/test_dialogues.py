"""Which part of a dialogue is scored, for templates with the habits of published ones."""

import datetime

import numpy as np
import pytest

from dpojax.data.example_maker import ExampleMaker
from dpojax.data.records import DataError, Record
from dpojax.data.tokenize_config import TokenizeConfig
from tests.data.chat_tokenizers import PLAIN, assistant, letters, tool, user

# Removes the reasoning of every turn, and begins an answer with <think>.
STRIPS = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}"
    "<a>{{ m.content.split('</think>')[-1] }}<e>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a><think>{% endif %}"
)
# Removes the reasoning of earlier turns, and writes an empty one into the last.
FORGETS = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}<e>{% else %}<a>"
    "{% if loop.last and '</think>' not in m.content %}<think></think>{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<e>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
# No system turn, and turns have to alternate.
STRICT = (
    "<s>{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}<{{ m.role[0] }}>{{ m.content | trim }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
# The number of turns stands at the start; what the assistant generated is marked.
COUNTED = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a>"
    "{% generation %}{{ m.content }}<e>{% endgeneration %}{% endif %}{{ messages | length }}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
# Tool calls are joined as text.
TEXT_ARGUMENTS = PLAIN.replace(
    "{{ c.function.arguments | tojson }}", "{{ ':' + c.function.arguments }}"
)
WITHOUT_CALLS = PLAIN.split("{% for c")[0] + "<e>\n" + PLAIN.split("{% endfor %}<e>\n")[1]


CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"at": "Bern"}}}]
CALLED = 'weather{"at": "Bern"}'
WIDE = dict(max_length=1000, identical="keep", empty="keep")


def rendered(record, tokenizer=None, **config):
    """(prompt, [response]) of the only example as text, with [ ] around what is scored; a report.

    In this process: no template here needs limits.
    """
    tokenizer = tokenizer or letters()
    examples, report = ExampleMaker(tokenizer, TokenizeConfig(**WIDE | config))([record])
    (example,) = examples
    texts = []
    for k, response in enumerate(example.responses):
        mask = np.ones(len(response), bool) if example.scored is None else example.scored[k]
        text, before = "", False
        for token, scored in zip(tokenizer.convert_ids_to_tokens(response), mask):
            text += ("[" if scored else "]") * int(scored != before) + token
            before = scored
        texts.append(text + "]" * int(before))
    prompt = "".join(tokenizer.convert_ids_to_tokens(example.prompt))
    return (prompt, texts), report


def notes(report):
    return {name: tally.count for name, tally in report.tallies["noted"].items()}


def dropped(record, tokenizer, **config):
    examples, report = ExampleMaker(tokenizer, TokenizeConfig(**WIDE | config))([record])
    assert len(examples) == 0
    ((cause, tally),) = report.tallies["dropped"].items()
    assert tally.examples == [record.id]
    return cause, tally.why


def test_an_answer_is_its_text_and_the_token_that_ends_it():
    record = Record("f:1", (user("q"),), ((assistant("yes"),), (assistant("no"),)))
    (prompt, texts), report = rendered(record)
    assert (prompt, texts) == ("<u>q<e>\n<a>", ["[yes<e>]", "[no<e>]"])
    assert notes(report) == {}


SEVERAL = ((assistant("one"), user("and?"), assistant("two")), (assistant("no"),))


def test_turns_of_the_user_inside_an_answer_are_context():
    record = Record("f:1", (user("q"),), SEVERAL)
    (prompt, texts), report = rendered(record)
    assert prompt == "<u>q<e>\n<a>"
    assert texts == ["[one<e>]\n<u>and?<e>\n<a>[two<e>]", "[no<e>]"]
    assert notes(report) == {"all_turns_scored": 1}


def test_a_token_that_the_template_writes_behind_the_whole_dialogue_is_no_turn():
    # Phi-3 writes its end of text where no answer is asked for, behind the last turn's own end.
    template = PLAIN.replace("<a>{% endif %}", "<a>{% else %}</s>{% endif %}")
    turns = (assistant("one"), user("r"), assistant("two"))
    record = Record("f:1", (user("q"),), (turns,))
    texts, report = rendered(record, letters(template, eos="</s>"))
    assert texts == ("<u>q<e>\n<a>", ["[one<e>]\n<u>r<e>\n<a>[two<e>\n</s>]"])
    assert notes(report) == {"all_turns_scored": 1}


def test_the_last_turn_alone_is_scored_if_the_config_says_so():
    record = Record("f:1", (user("q"),), SEVERAL)
    (prompt, texts), report = rendered(record, assistant_turns="last")
    assert texts == ["one<e>\n<u>and?<e>\n<a>[two<e>]", "[no<e>]"]
    assert notes(report) == {"last_turn_scored": 1}
    alone = Record("f:1", (user("q"),), SEVERAL[:1])  # what comes before belongs to the prompt
    (prompt, texts), _ = rendered(alone, assistant_turns="last")
    assert (prompt, texts) == ("<u>q<e>\n<a>one<e>\n<u>and?<e>\n<a>", ["[two<e>]"])


def test_results_of_tools_are_context_and_calls_are_scored():
    turns = (assistant(None, tool_calls=CALL), tool("sunny"), assistant("It shines"))
    record = Record("f:1", (user("q"),), (turns, (assistant("no"),)))
    (_, texts), _ = rendered(record)
    assert texts == [f"[{CALLED}<e>]\n<t>sunny<e>\n<a>[It shines<e>]", "[no<e>]"]


@pytest.mark.parametrize("content", ["", None])
def test_an_answer_that_is_a_tool_call_trains(content):
    call = assistant(content, tool_calls=CALL)
    record = Record("f:1", (user("q"),), ((call,), (assistant("no"),)))
    (_, texts), report = rendered(record, empty="drop")
    assert texts == [f"[{CALLED}<e>]", "[no<e>]"]
    assert notes(report) == {}


def test_arguments_become_text_where_the_template_wants_text():
    record = Record("f:1", (user("q"),), ((assistant("", tool_calls=CALL),), (assistant("no"),)))
    (_, texts), _ = rendered(record, letters(TEXT_ARGUMENTS))
    assert texts[0] == '[weather:{"at": "Bern"}<e>]'


def test_a_call_that_the_template_leaves_out_is_no_answer():
    record = Record("f:1", (user("q"),), ((assistant("", tool_calls=CALL),), (assistant("no"),)))
    assert dropped(record, letters(WITHOUT_CALLS)) == ("tool_call_not_rendered", "")
    both = (assistant("See:", tool_calls=CALL),)
    (_, texts), report = rendered(Record("f:1", (user("q"),), (both,)), letters(WITHOUT_CALLS))
    assert texts == ["[See:<e>]"]
    assert notes(report) == {"template_strips": 1}


@pytest.mark.parametrize("template", [PLAIN, STRICT, STRIPS, FORGETS])
def test_a_prompt_that_ends_with_the_assistant_is_continued(template):
    prompt = (user("q"), assistant("Once upon"))
    record = Record("f:1", prompt, ((assistant(" a time"),), (assistant(" a mat"),)))
    (prompt, texts), _ = rendered(record, letters(template))
    assert prompt.endswith("Once upon")
    assert texts == ["[ a time<e>]", "[ a mat<e>]"]


def test_a_template_that_strips_reasoning_trains_and_tells():
    record = Record("f:1", (user("q"),), ((assistant("hm</think>yes"),), (assistant("no"),)))
    (prompt, texts), report = rendered(record, letters(STRIPS))
    # The generation prompt's <think> is not there in the rendered dialogue either.
    assert (prompt, texts) == ("<u>q<a>", ["[yes<e>]", "[no<e>]"])
    assert notes(report) == {"template_strips": 1}
    _, report = rendered(Record("f:1", (user("q"),), ((assistant("yes"),),)), letters(STRIPS))
    assert notes(report) == {}


def test_what_a_template_writes_into_the_last_answer_is_scored():
    record = Record("f:1", (user("q"),), ((assistant("yes"),), (assistant("hm</think>no"),)))
    (prompt, texts), report = rendered(record, letters(FORGETS))
    assert (prompt, texts) == ("<u>q<e><a>", ["[<think></think>yes<e>]", "[hm</think>no<e>]"])
    assert notes(report) == {}


def test_a_template_that_forgets_reasoning_is_scored_as_it_renders():
    turns = (assistant("hm</think>one"), user("r"), assistant("so</think>two"))
    (_, texts), report = rendered(Record("f:1", (user("q"),), (turns,)), letters(FORGETS))
    assert texts == ["[one<e>]<u>r<e><a>[so</think>two<e>]"]
    assert notes(report) == {"all_turns_scored": 1, "template_strips": 1}


def test_an_answer_before_any_question_is_found():
    turns = (assistant("Hello"), user("q"), assistant("yes"))
    (_, texts), _ = rendered(Record("f:1", (user(""),), (turns,)))
    assert texts == ["[Hello<e>]\n<u>q<e>\n<a>[yes<e>]"]


def test_the_templates_own_marks_are_used_where_nothing_else_tells():
    """Behind every turn stands the number of all, so no part is the beginning of the whole."""
    turns = (assistant("a"), user("r"), assistant("b"))
    assert dropped(Record("f:1", (user("q"),), (turns,)), letters(COUNTED)) == (
        "template_changes_prompt",
        "",
    )
    inside = COUNTED.replace("{{ messages | length }}", "{{ loop.revindex0 if loop.index > 2 }}")
    inside = inside.replace("generation %}{{ m.content }}", "generation %}{{ m.content | upper }}")
    (prompt, texts), _ = rendered(Record("f:1", (user("q"),), (turns,)), letters(inside))
    assert (prompt, texts) == ("<u>q<a>", ["[A<e>]<u>r1<a>[B<e>]"])


def test_a_template_that_ends_turns_with_another_token_than_eos_gets_eos_too():
    record = Record("f:1", (user("q"),), SEVERAL)
    (_, texts), report = rendered(record, letters(eos="</s>"))
    assert texts == ["[one<e>]\n<u>and?<e>\n<a>[two<e></s>]", "[no<e></s>]"]
    assert notes(report) == {"all_turns_scored": 1, "other_end": 1}
    (_, texts), report = rendered(record, letters(eos="</s>"), append_eos=False)
    assert texts[1] == "[no<e>]"


def test_a_dialogue_has_to_end_with_the_assistant():
    record = Record("f:1", (user("q"),), ((assistant("yes"), user("why?")), (assistant("no"),)))
    assert dropped(record, letters()) == ("ends_without_answer", "")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ messages[9].content.text }}", "no element 9"),
        ("{{ '%d' % 'x' }}", "TypeError"),
        ("{{ messages | sort(attribute='role.x.y') | list }}", ""),
        ("{{ [1][5:][0].x }}", "has no element 0"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages | batch(0.5) | map('abs') | list }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ no_such_function(1) }}", "'no_such_function' is undefined"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", ""),
        ("{{ strftime_now(1) }}", "TypeError"),
    ],
)
def test_an_error_of_any_kind_in_a_template_drops_the_record_and_is_told(template, told):
    record = Record("f:7", (user("q"),), ((assistant("yes"),), (assistant("no"),)))
    cause, why = dropped(record, letters("{{ messages[0].content }}" + template))
    assert cause == "template_refuses" or not told
    assert told in why
    with pytest.raises(DataError, match=r"f:7: .*(malformed|template_)"):
        ExampleMaker(letters(template), TokenizeConfig(**WIDE, malformed="error"))([record])


def test_one_refused_record_does_not_end_the_others():
    records = [
        Record("f:1", ({"role": "system", "content": "S"}, user("q")), ((assistant("yes"),),)),
        Record("f:2", (user("q"),), ((assistant("yes"),),)),
        Record("f:3", (user("q"), user("q")), ((assistant("yes"),),)),
    ]
    examples, report = ExampleMaker(letters(STRICT), TokenizeConfig(**WIDE))(records)
    assert [example.id for example in examples] == ["f:2"]
    tally = report.tallies["dropped"]["template_refuses"]
    assert (tally.count, tally.examples, tally.why) == (2, ["f:1", "f:3"], "no system turn")
    assert "no system turn" in str(report)


def test_tools_and_options_reach_the_template_or_are_told():
    asks = "{% if tools %}{{ tools[0].function.name }}{% endif %}{{ mood }}" + PLAIN
    tools = ({"type": "function", "function": {"name": "weather"}},)
    more = dict(tools=tools, template_options={"mood": "gay"})
    record = Record("f:1", (user("q"),), ((assistant("yes"),),), **more)
    (prompt, _), report = rendered(record, letters(asks))
    assert prompt == "weathergay<u>q<e>\n<a>"
    assert notes(report) == {}
    _, report = rendered(record, letters(PLAIN))
    assert notes(report) == {"template_without_tools": 1, "template_without_options": 1}


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "add_generation_prompt", "tools"])
def test_a_records_options_cannot_take_the_place_of_ours(name):
    record = Record("f:1", (user("q"),), ((assistant("y"),),), template_options={name: "{{ 1 }}"})
    assert dropped(record, letters()) == (
        "template_refuses",
        f"chat_template_kwargs may not set {name}",
    )


def test_named_templates_without_a_default_say_which_key_to_set():
    record = Record("f:1", (user("q"),), ((assistant("yes"),),))
    named = {"rag": PLAIN, "tool_use": "T" + PLAIN}
    with pytest.raises(DataError, match=r"f:1: .* \(rag, tool_use\) .* config\.chat_template"):
        rendered(record, letters(named))
    (prompt, _), _ = rendered(record, letters({**named, "default": "D" + PLAIN}))
    assert prompt == "D<u>q<e>\n<a>"
    tools = Record("f:1", (user("q"),), ((assistant("yes"),),), tools=({"type": "function"},))
    (prompt, _), _ = rendered(tools, letters(named))
    assert prompt == "T<u>q<e>\n<a>"


def test_a_template_that_is_no_jinja_ends_the_run_with_its_line():
    record = Record("f:1", (user("q"),), ((assistant("yes"),),))
    with pytest.raises(DataError, match=r"no valid Jinja \(line 2: .*endfor"):
        rendered(record, letters("\n{% for m in messages %}"))


def test_a_template_may_ask_for_the_date():
    record = Record("f:1", (user("q"),), ((assistant("yes"),),))
    (prompt, _), _ = rendered(record, letters("{{ strftime_now('%Y') }}" + PLAIN))
    assert prompt == f"{datetime.date.today().year}<u>q<e>\n<a>"


def test_a_saved_limit_of_a_tokenizer_neither_cuts_nor_pads():
    tokenizer = letters()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    record = Record("f:1", "the question", (" the answer", " no"))
    (prompt, texts), _ = rendered(record, tokenizer)
    assert (prompt, texts) == ("the question", ["[ the answer<e>]", "[ no<e>]"])


def test_a_cut_answer_keeps_its_mask():
    record = Record("f:1", (user("q"),), SEVERAL)
    (prompt, texts), _ = rendered(record, max_length=12, truncation="cut_response_end")
    assert (prompt, texts) == ("<u>q<e>\n<a>", ["[one<e>]\n<u>a", "[no<e>]"])  # 5 + 7 tokens


def test_an_answer_of_which_no_scored_token_is_left_is_dropped():
    asked = (user("q"), assistant("", tool_calls=CALL))
    answers = (tool("sunny"), assistant("yes")), (tool("none"), assistant("yes"))
    record = Record("f:1", asked, answers)
    (prompt, texts), _ = rendered(record)
    assert prompt == f"<u>q<e>\n<a>{CALLED}<e>\n"
    assert texts == ["<t>sunny<e>\n<a>[yes<e>]", "<t>none<e>\n<a>[yes<e>]"]
    room = len(CALLED) + 7 + 8  # eight tokens of the first answer, of which none is scored
    cut = dict(max_length=room, truncation="cut_response_end")
    assert dropped(record, letters(), **cut) == ("nothing_left", "")
