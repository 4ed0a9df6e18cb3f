"""Records are tokenised in other processes: the same examples, and within limits."""

import os
import pathlib
import subprocess
import sys

import pytest

from dpojax.data import processes
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.data.templates import LimitExceeded
from dpojax.data.tokenise import AHEAD, tokenise_chunks
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.data.worker import Limits
from tests.data.chat_tokenizers import PLAIN, assistant, letters, user


def record(number):
    """Every third is a dialogue, every fifth has equal answers."""
    good, bad = f"yes {number}", "yes" if number % 5 else f"yes {number}"
    if number % 3:
        return Record(f"f:{number}", f"q {number}", (good, bad), source=f"s{number % 2}")
    answers = (assistant(good),), (assistant(bad),)
    return Record(f"f:{number}", (user(f"q {number}"),), answers)


CHUNKS = [[record(10 * i + j) for j in range(10)] for i in range(5)] + [[]]
WIDE = TokenizeConfig(max_length=100)


def made(num_proc, chunks=CHUNKS, tokenizer=None):
    report = Report()
    report.read = sum(map(len, chunks))
    each = tokenise_chunks(
        iter(chunks), tokenizer or letters(), WIDE, report, sources=["s0", "s1"], num_proc=num_proc
    )
    return list(each), report


def plain(example):
    return [part.tolist() for part in (example.prompt, *example.responses)], example[3:10]


TEXTS = [[each for each in chunk if isinstance(each.prompt, str)] for chunk in CHUNKS * 3]
COUNTS = [
    sum(number % 3 > 0 and number % 5 > 0 for number in range(10 * i, 10 * i + 10))
    for i in range(5)
] + [0]


@pytest.mark.long
@pytest.mark.parametrize(("chunks", "counts"), [(CHUNKS, [8] * 5 + [0]), (TEXTS, COUNTS * 3)])
def test_the_examples_and_their_report_do_not_depend_on_the_number_of_processes(chunks, counts):
    first, report = made(1, chunks)
    assert [len(examples) for examples in first] == counts
    assert report.tallies["dropped"]["identical"].examples in (["f:0", "f:5"], ["f:5", "f:10"])
    assert {example.source for examples in first for example in examples} == {0, 1}
    again, other = made(3, chunks)
    as_lists = lambda chunks: [[*map(plain, examples)] for examples in chunks]
    assert as_lists(again) == as_lists(first)
    assert other.to_content() == report.to_content()


@pytest.mark.long
def test_this_process_is_one_of_those_that_share_texts(monkeypatch):
    start, begun = processes.Pool._start, []

    def counting(pool, setup):
        begun.append(pool)
        return start(pool, setup)

    monkeypatch.setattr(processes.Pool, "_start", counting)
    made(2, TEXTS)
    assert len(begun) == 1


def test_texts_need_no_other_process(monkeypatch):
    def never(*_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(processes.Pool, "_start", never)
    texts = [[each for each in chunk if isinstance(each.prompt, str)] for chunk in CHUNKS]
    few, _ = made(0, texts[:3])
    one, _ = made(1, texts)
    assert [len(examples) for examples in few] == [len(examples) for examples in one[:3]]


@pytest.mark.long
def test_the_examples_come_before_all_records_are_read():
    read = []

    def chunks():
        for number, chunk in enumerate(CHUNKS[:5] * 4):
            read.append(number)
            yield chunk

    first = next(tokenise_chunks(chunks(), letters(), WIDE, Report(), num_proc=2))
    assert len(first) == 8
    assert len(read) <= 2 * 2 + AHEAD + 1  # of 20, however slow the other process is


@pytest.fixture
def short_limits(monkeypatch):
    """Also a new process: one that was started before may not be used."""
    processes.end_idle()
    monkeypatch.setattr(processes, "LIMITS", Limits(seconds=1, memory=2**28))
    yield
    processes.end_idle()


HOSTILE = {
    "memory": [
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}{{ ns.x }}",
        "{{ 'ab' * 10 ** 11 }}",
        "{{ 'ab' | center(10 ** 11) }}",
        "{{ '%99999999999d' % 1 }}",
    ],
    "end in": [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{{ 9 ** (9 ** 9) }}",
    ],
}
CASES = [(template, told) for told, templates in HOSTILE.items() for template in templates]


@pytest.mark.long
@pytest.mark.parametrize(("template", "told"), CASES)
def test_a_template_that_takes_too_much_is_stopped(short_limits, template, told):
    with pytest.raises(LimitExceeded, match=f"f:3.*{told}.*config.chat_template"):
        made(1, [[record(3)]], letters(template + PLAIN))
    with pytest.raises(LimitExceeded, match=told):
        processes.check_template(letters(template + PLAIN), [user("q"), assistant("yes")])


@pytest.mark.long
def test_a_template_that_doubles_is_stopped_and_the_next_one_works(short_limits):
    template, told = CASES[0]
    with pytest.raises(LimitExceeded, match=f"f:3.*{told}.*config.chat_template"):
        made(1, [[record(3)]], letters(template + PLAIN))
    (examples,), _ = made(1, [[record(3)]])
    assert len(examples) == 1


@pytest.mark.long
def test_a_template_that_only_refuses_passes_the_probe():
    for template in ("{{ raise_exception('no') }}", "{% for %}", {"rag": PLAIN}, None):
        processes.check_template(letters(template), [user("q"), assistant("yes")])


@pytest.mark.long
def test_a_process_that_is_killed_is_told_with_its_records(monkeypatch):
    start = processes.Pool._start

    def start_and_kill(pool, setup):
        worker = start(pool, setup)
        worker.process.kill()
        return worker

    monkeypatch.setattr(processes.Pool, "_start", start_and_kill)
    with pytest.raises(DataError, match=r"f:0 to f:9: the process .* was killed"):
        made(1)


@pytest.mark.long
def test_errors_of_the_data_are_raised_here_and_nothing_is_left():
    with pytest.raises(DataError, match="no chat template"):
        made(2, tokenizer=letters(None))
    processes.end_idle()
    assert processes._idle == []


@pytest.mark.long
def test_a_process_neither_imports_jax_nor_runs_the_users_script(tmp_path):
    """The script has no `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "print('script', file=sys.stderr)\n"
        "from tests.data.test_processes import made, record\n"
        "(examples,), _ = made(1, [[record(3)]])\n"
        "print(len(examples))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    options = dict(capture_output=True, text=True, check=True, env=environment)
    done = subprocess.run([sys.executable, script], **options)
    assert done.stderr.count("script") == 1
    assert done.stdout == "1\n"
    code = "import sys, dpojax.data.worker, dpojax.data.example_maker; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.stdout == "False\n"
