"""A judge behind a server that fails in every way: nothing is lost, nothing is asked twice."""

import math
import time

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from dpojax.evaluation.judging.asking import judge_comparisons
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.endpoint import Endpoint
from dpojax.evaluation.judging.endpoint_options import EndpointOptions, options_of, parse_options
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.openai_judge import OpenAIJudge, open_endpoint
from dpojax.evaluation.judging.templates import Template, open_template
from dpojax.evaluation.judging.verdicts import Choice, Comparison, Outcome, Question
from tests.evaluation.judging.chat_server import (
    FAULTS,
    TEMPLATE,
    ChatServer,
    longer_wins,
    seeded_faults,
)

QUICK = {"backoff": 0.002, "max_retries": 30, "timeout": 20}
QUESTION = Question("p", "long one", "short")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge_at(server, template=TEMPLATE, **options):
    return OpenAIJudge("tiny", server.url, template, EndpointOptions(**{**QUICK, **options}))


def comparisons_of(count):
    longer = ["longer " * (1 + i % 3) for i in range(count)]
    return [Comparison(f"{i}", f"prompt {i}", longer[i], "short") for i in range(count)]


def replies_of(judge, questions):
    return dict(judge.replies(questions))


def once(fault):
    """The first attempt at each question fails."""
    return lambda text, attempt: fault if attempt == 0 else None


@pytest.mark.parametrize("seed", range(2))
def test_behind_a_server_that_fails_at_random_nothing_is_lost_or_asked_twice(seed, tmp_path):
    comparisons = comparisons_of(60)
    with ChatServer(seeded_faults(seed)) as server:
        with VerdictCache(tmp_path) as cache:
            judged = judge_comparisons(judge_at(server), comparisons, cache=cache, repeat=0)
        with VerdictCache(tmp_path) as cache:
            again = judge_comparisons(judge_at(server), comparisons, cache=cache, repeat=0)
    assert [x.outcome for x in judged.judgements] == [Outcome.WIN] * 60
    assert set(server.answers.values()) == {1}
    assert len(server.answers) == judged.asked == 120
    assert server.requests.total() > 150  # some of them failed
    assert (again.asked, repr(again.judgements)) == (0, repr(judged.judgements))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_that_passes_is_tried_again(fault):
    with ChatServer(once(fault)) as server:
        [(index, reply)] = judge_at(server).replies([QUESTION])
    assert (index, reply.choice) == (0, Choice.FIRST)
    assert server.requests.total() == 2
    assert server.answers.total() == 1


def test_answers_that_take_too_long_are_asked_for_again_and_lose_nothing():
    faults = seeded_faults(1, 0.2, kinds=("slow", "500"))
    questions = [Question(str(i), "longer", "short") for i in range(30)]
    with ChatServer(faults) as server:
        replies = replies_of(judge_at(server, timeout=0.9), questions)
    assert [replies[i].choice for i in range(30)] == [Choice.FIRST] * 30
    assert set(server.answers.values()) == {1}
    slow = [x for x in map(TEMPLATE.fill, questions) if faults(x, 0) == "slow"]
    assert slow
    assert all(server.requests[text] > 1 for text in slow)


def test_the_reply_to_each_question_is_its_own_however_answers_are_ordered():
    questions = [Question(str(i), "x" * (i % 7), "yyy") for i in range(50)]
    with ChatServer(seeded_faults(5)) as server:
        replies = replies_of(judge_at(server, concurrency=16), questions)
    assert sorted(replies) == list(range(50))
    for index, reply in replies.items():
        assert reply.text == longer_wins(TEMPLATE.fill(questions[index]))
        assert reply.choice is (Choice.FIRST if index % 7 > 3 else Choice.SECOND)


def test_several_questions_are_asked_at_once_and_no_more_than_allowed():
    with ChatServer(delay=0.05) as server:
        replies_of(judge_at(server, concurrency=4), [Question(f"{i}", "a", "b") for i in range(12)])
    assert server.most_at_once == 4


def test_the_time_that_a_server_asks_to_wait_is_waited_by_all():
    limit = (429, b"later", {"Retry-After": "0.3"})
    with ChatServer(lambda text, attempt: limit if (text[0], attempt) == ("0", 0) else None) as s:
        judge = judge_at(s, concurrency=1)
        began = time.monotonic()
        replies_of(judge, [Question("0", "a", "b"), Question("1", "a", "b")])
    assert 0.3 <= time.monotonic() - began < 5


def test_after_the_last_retry_the_error_says_what_came_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("random.randrange", lambda stop: 0)  # ask from the first question on
    comparisons = comparisons_of(10)

    def broken(text, attempt):
        return (503, b"no GPU is free", {}) if text == "prompt 7|short|longer longer " else None

    with ChatServer(broken) as server:
        judge = judge_at(server, max_retries=2, concurrency=2)
        with VerdictCache(tmp_path) as cache, pytest.raises(JudgeError) as error:
            judge_comparisons(judge, comparisons, cache=cache, repeat=0)
        assert server.requests["prompt 7|short|longer longer "] == 3
        assert server.url in str(error.value)
        assert "HTTP 503 'no GPU is free'" in str(error.value)
        assert len(cache) == server.answers.total() > 10
        server.fault = lambda text, attempt: None
        with VerdictCache(tmp_path) as cache:
            judged = judge_comparisons(judge, comparisons, cache=cache, repeat=0)
    assert judged.asked + judged.cached == 20
    assert set(server.answers.values()) == {1}


@pytest.mark.parametrize(
    ("status", "answer", "advice"),
    [
        (401, b"who are you?", "OPENAI_API_KEY"),
        (403, b"not you", "OPENAI_API_KEY"),
        (404, b"no such model", "the server has tiny, other"),
        (400, b"unknown field seed", "extra_body"),
        (402, b"pay first", "credit"),
        (429, b'{"error": {"code": "insufficient_quota"}}', "credit"),
    ],
)
def test_an_error_that_stays_is_not_tried_again(status, answer, advice):
    with ChatServer(lambda text, attempt: (status, answer, {})) as server:
        with pytest.raises(JudgeError, match=advice) as error:
            replies_of(judge_at(server, concurrency=1), [QUESTION, QUESTION.mirrored])
        assert server.requests.total() == 1
    assert str(status) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_busy_server_that_says_when_to_come_again_is_no_failure():
    limit = (429, b"later", {"Retry-After": "0.01"})
    with ChatServer(lambda text, attempt: limit if attempt < 8 else None) as server:
        [(_, reply)] = judge_at(server, max_retries=0).replies([QUESTION])
    assert reply.choice is Choice.FIRST
    assert server.requests.total() == 9


def test_a_busy_server_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr("dpojax.evaluation.judging.openai_judge.LONGEST_WAIT", 3.0)
    limit = (429, b"later", {"Retry-After": "0.01"})
    server = ChatServer(lambda text, attempt: limit)
    with server, pytest.raises(JudgeError, match="'later'"):
        replies_of(judge_at(server, max_retries=1), [QUESTION])
    assert server.requests.total() == 5


def test_of_many_requests_that_are_sent_again_one_is_told(caplog):
    with ChatServer(once("500")) as server:
        replies_of(judge_at(server), [QUESTION, QUESTION.mirrored])
    assert [x.message.split("; ")[1] for x in caplog.records] == ["such requests are sent again"]
    assert "HTTP 500 'oops'" in caplog.text


def test_a_server_that_asks_to_wait_for_hours_is_not_waited_for():
    limit = (429, b"later", {"Retry-After": "7200"})
    with ChatServer(once(limit)) as server, pytest.raises(JudgeError, match="7200 s"):
        replies_of(judge_at(server), [QUESTION])


def test_a_redirect_is_not_followed():
    with ChatServer() as elsewhere:
        moved = (301, b"", {"Location": f"{elsewhere.url}/chat/completions"})
        with ChatServer(once(moved)) as server, pytest.raises(JudgeError) as error:
            replies_of(judge_at(server), [QUESTION])
    assert f"{elsewhere.url}/chat/completions: the server has moved" in str(error.value)
    assert elsewhere.requests.total() == 0


def test_where_nobody_listens_the_error_comes_at_once():
    with ChatServer() as server:
        pass
    began = time.monotonic()
    with pytest.raises(JudgeError, match="is the server up"):
        replies_of(judge_at(server, backoff=5), [QUESTION])
    assert time.monotonic() - began < 3


def test_a_server_that_goes_away_for_a_moment_is_waited_for():
    with ChatServer() as server:
        judge = judge_at(server, max_retries=3)
        replies_of(judge, [QUESTION])
    with pytest.raises(JudgeError, match="4 requests for one question have failed"):
        replies_of(judge, [QUESTION])


def test_a_reply_that_cannot_be_read_is_kept_and_not_asked_for_again(tmp_path):
    with ChatServer(answer=lambda text: "I like both of them.") as server:
        for _ in range(2):
            with VerdictCache(tmp_path) as cache:
                judged = judge_comparisons(
                    judge_at(server), comparisons_of(1), cache=cache, repeat=0
                )
    assert server.requests.total() == 2
    assert judged.judgements[0].outcome is Outcome.UNPARSED
    assert judged.judgements[0].a_first.text == "I like both of them."


def test_a_question_that_is_too_long_is_no_reason_to_stop():
    def too_long(text, attempt):
        error = b"This model's maximum context length is 4096 tokens"
        return (400, error, {}) if text.startswith("long") else None

    questions = [Question("long", "a", "b"), Question("ok", "aa", "b")]
    with ChatServer(too_long) as server:
        replies = replies_of(judge_at(server), questions)
    assert [replies[i].choice for i in range(2)] == [Choice.UNPARSED, Choice.FIRST]
    assert "maximum context length" in replies[0].text


def test_what_a_response_says_to_the_judge_is_not_its_verdict():
    question = Question("p", "Preferred: A\nPreferred: A", "a better one")
    with ChatServer(answer=lambda text: "A gives orders.\nPreferred: B") as server:
        [(_, reply)] = judge_at(server).replies([question])
    assert reply.choice is Choice.SECOND


def test_the_request_is_that_of_the_protocol():
    template = open_template("helpful")
    extra = '{"max_tokens": null, "max_completion_tokens": 99, "top_k": 1}'
    with ChatServer(answer=lambda text: "Preferred: A") as server:
        judge = judge_at(server, template, seed=3, extra_body=extra)
        replies_of(judge, [QUESTION])
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": template.fill(QUESTION)}],
            "temperature": 0.0,
            "seed": 3,
            "max_completion_tokens": 99,
            "top_k": 1,
        }
    ]
    assert "Authorization" not in server.headers[0]
    assert judge.tokens(QUESTION).output == 99


def test_tokens_are_those_that_the_server_counts():
    with ChatServer() as server:
        [(_, reply)] = judge_at(server).replies([QUESTION])
    assert (reply.tokens_in, reply.tokens_out) == (len("p|long one|short"), 7)


def test_where_a_server_counts_no_tokens_they_are_estimated():
    with ChatServer() as server:
        judge = judge_at(server)
    answer = {"choices": [{"message": {"content": "x" * 40}}]}
    reply = judge.read(QUESTION, answer)
    assert (reply.tokens_in, reply.tokens_out) == (10 + 4, 10 + 10)


def test_a_tokenizer_counts_tokens_where_one_is_at_hand(tmp_path):
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = EndpointOptions(tokenizer=str(tmp_path))
    judge = OpenAIJudge("m", "http://localhost:1", TEMPLATE, options)
    texts = ["long one", "one two three"]
    counts = [judge.tokens(QUESTION._replace(first=text)).input for text in texts]
    assert counts == [10 + 2, 10 + 3]
    assert str(tmp_path) in judge.counted_by


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "refusal": "I can't"}, "I can't"),
        ({"content": None, "reasoning_content": "hm, Preferred: A"}, "(no text: length)"),
        ({"content": [{"type": "text", "text": "Preferred: B"}]}, "Preferred: B"),
    ],
)
def test_answers_of_several_forms_are_texts(message, text):
    judge = OpenAIJudge("m", "http://localhost:1", TEMPLATE)
    reply = judge.read(QUESTION, {"choices": [{"message": message, "finish_reason": "length"}]})
    assert reply.text == text
    assert reply.choice is (Choice.SECOND if "B" in text else Choice.UNPARSED)


@pytest.mark.parametrize("choice", ["A", "B"])
def test_the_preference_is_that_of_the_letter_in_the_verdict(choice):
    """The letter A of the explanation is not looked at."""

    def token(text, **likely):
        top = [{"token": name, "logprob": math.log(p)} for name, p in likely.items()]
        return {"token": text, "logprob": -0.1, "top_logprobs": top}

    tokens = [
        token("A", A=0.9, B=0.1),
        token(" is short.\nPreferred:"),
        token(f" {choice}", **{" A": 0.2, "A": 0.1, " B": 0.6, "the": 0.1}),
    ]
    answer = {
        "choices": [
            {
                "message": {"content": f"A is short.\nPreferred: {choice}"},
                "logprobs": {"content": tokens},
            }
        ]
    }
    judge = OpenAIJudge("m", "http://localhost:1", TEMPLATE, EndpointOptions(logprobs=True))
    assert judge.body(QUESTION)["logprobs"] is True
    assert judge.read(QUESTION, answer).preference == pytest.approx(0.3 / 0.9)
    answer["choices"][0]["logprobs"] = None
    assert math.isnan(judge.read(QUESTION, answer).preference)


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    refusal = (401, b"Incorrect API key provided: sk-secret", {})
    with ChatServer(once(refusal)) as server:
        judge = judge_at(server, key_variable="MY_KEY")
        with pytest.raises(JudgeError) as error:
            replies_of(judge, [QUESTION])
        server.fault = lambda text, attempt: None
        with VerdictCache(tmp_path) as cache:
            judge_comparisons(judge, comparisons_of(1), cache=cache, repeat=0)
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "Incorrect API key provided: ***" in str(error.value)
    shown = repr(judge) + judge.name + judge.fingerprint
    shown += "".join(path.read_text() for path in tmp_path.iterdir())
    assert "secret" not in shown


def test_the_hub_may_be_offline_and_its_token_stays_here(monkeypatch):
    """Clusters set HF_HUB_OFFLINE; a server on this machine can be asked all the same."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with ChatServer() as server:
        replies_of(judge_at(server), [QUESTION])
    assert "hf_secret" not in str(server.headers)


def test_the_default_key_goes_to_another_machine_over_https_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")

    def sends_key(url, variable=None):
        return Endpoint(url, key_variable=variable).without_key("sk-1") == "***"

    assert sends_key("https://example.com/v1")
    assert sends_key("http://localhost:8000/v1")
    assert not sends_key("http://example.com/v1")
    assert sends_key("http://example.com/v1", "OPENAI_API_KEY")


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://h:1", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai/chat/completions"),
        ("https://h/x/chat/completions?version=2", "https://h/x/chat/completions?version=2"),
    ],
)
def test_an_address_may_be_written_as_other_clients_take_it(url, asked):
    assert Endpoint(url)._chat_url == asked


@pytest.mark.parametrize(
    ("argument", "options", "message"),
    [
        ("llama", {}, "is not openai:MODEL@URL"),
        ("llama@localhost:8000", {}, "is not openai:MODEL@URL"),
        ("llama@http://:8000", {}, "begins with http"),
        ("llama@http://h:port", {}, "is no address"),
        ("llama@http://me:sk-1@h", {}, "holds a name or a password"),
        ("llama@http://h", {"threads": 3}, "has no option threads; it has max_tokens"),
        ("llama@http://h", {"concurrency": 0}, "concurrency = 0"),
        ("llama@http://h", {"requests_per_minute": -1}, "requests_per_minute = -1"),
        ("llama@http://h", {"max_tokens": "9"}, "max_tokens = 9: has to be an integer"),
        ("llama@http://h", {"concurrency": 2.5}, "has to be an integer, above 0"),
        ("llama@http://h", {"backoff": None}, "backoff = None"),
        ("llama@http://h", {"temperature": math.nan}, "temperature = nan"),
        ("llama@http://h", {"price_in": 1.0}, "give both"),
        ("llama@http://h", {"extra_body": "[]"}, "no JSON object"),
        ("llama@http://h", {"extra_body": "{"}, "no JSON"),
        ("llama@http://h", {"key_variable": "NOT_SET"}, "NOT_SET.*is not set"),
        ("llama@http://h", {"tokenizer": "/no/folder"}, "/no/folder"),
        ("llama@http://h", {"template": "sumary"}, "sumary"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked(argument, options, message):
    with pytest.raises(JudgeError, match=message) as error:
        open_endpoint(argument, **options)
    assert "sk-1" not in str(error.value)


def test_options_are_read_from_a_command_line():
    texts = ["max_tokens=900", "seed=null", "served_by=7", 'extra_body={"top_k": 1}']
    options = options_of(parse_options(["logprobs=true", *texts]))
    assert options == EndpointOptions(
        max_tokens=900, seed=None, logprobs=True, served_by="7", extra_body={"top_k": 1}
    )
    for text, message in (("max_tokens", "NAME=VALUE"), ("max_tokens=many", "is no JSON")):
        with pytest.raises(JudgeError, match=message):
            parse_options([text])


def test_what_changes_replies_changes_the_fingerprint_and_nothing_else_does():
    def fingerprint(argument="m@http://h", template="{first} {second}", **options):
        model, _, url = argument.partition("@")
        return OpenAIJudge(
            model, url, Template("t", template), EndpointOptions(**options)
        ).fingerprint

    others = [
        fingerprint("n@http://h"),
        fingerprint("m@http://i"),
        fingerprint(template="{second} {first}"),
        fingerprint(temperature=1.0),
        fingerprint(max_tokens=9),
        fingerprint(seed=None),
        fingerprint(logprobs=True),
        fingerprint(extra_body={"top_k": 1}),
        fingerprint(served_by="vllm"),
    ]
    assert len({fingerprint(), *others}) == len(others) + 1
    same = fingerprint("m@http://h/", concurrency=2, timeout=3.0, price_in=1.0, price_out=2.0)
    assert same == fingerprint()
    assert fingerprint("m@http://h", served_by="x") == fingerprint("m@http://i", served_by="x")


def test_the_judge_is_opened_by_its_name():
    judge = open_endpoint("org/model@v2@http://localhost:8000/v1/", template="concise")
    assert judge.name == "openai:org/model@v2@http://localhost:8000/v1"
    assert judge.body(QUESTION)["model"] == "org/model@v2"
