"""Responses of a policy: what is drawn once stays, whoever is killed and whatever else is drawn."""

import dataclasses
import json

import jax
import pytest

from dpojax import storage
from dpojax.data import reviews
from dpojax.data.references import prompt_ids, read_prompts_with_references
from dpojax.evaluation.policies import response_texts
from dpojax.evaluation.rewards import Reward
from dpojax.runs import responses
from dpojax.runs.policy import load_policy
from dpojax.runs.responses import (
    FILE,
    Drawing,
    PolicyResponses,
    Response,
    best_responses,
    share_cut,
)
from dpojax.sampling import build_sampler, generate

from .test_preferences import save_model

PROMPTS = read_prompts_with_references("reviews", limit=9)
DRAWING = Drawing(temperature=1.0, samples=3, max_new_tokens=9, seed=5)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_policy(save_model(tmp_path_factory.mktemp("policy") / "model"))


@pytest.fixture
def drawer(policy, tmp_path):
    return PolicyResponses(policy, storage.as_path(tmp_path / "responses"), batch_size=8)


@pytest.fixture(scope="module")
def drawn(policy, tmp_path_factory):
    folder = storage.as_path(tmp_path_factory.mktemp("drawn"))
    return PolicyResponses(policy, folder, batch_size=8).draw(PROMPTS, DRAWING)


@pytest.fixture
def draws(monkeypatch):
    """How many prompts each call of the sampler got."""
    counts = []

    def counted(sampler, params, prompts, **how):
        counts.append(len(prompts))
        return generate(sampler, params, prompts, **how)

    monkeypatch.setattr(responses, "generate", counted)
    return counts


def lines(drawer):
    (path,) = drawer.folder.glob(f"*/{FILE}")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_response_depends_on_its_prompt_and_not_on_the_batch(policy, drawn, tmp_path):
    expected = {p.text: of_prompt for p, of_prompt in zip(PROMPTS, drawn)}
    for number, (prompts, batch_size) in enumerate([(PROMPTS[::-1], 8), (PROMPTS[3:6], 1)]):
        folder = storage.as_path(tmp_path / str(number))
        other = PolicyResponses(policy, folder, batch_size=batch_size)
        assert other.draw(prompts, DRAWING) == [expected[p.text] for p in prompts]


def test_the_first_responses_are_the_same_however_many_are_drawn(drawer, drawn):
    few = drawer.draw(PROMPTS, dataclasses.replace(DRAWING, samples=2))
    assert few == [of_prompt[:2] for of_prompt in drawn]


def test_what_is_there_is_not_drawn_again(drawer, drawn, draws):
    drawer.draw(PROMPTS, DRAWING)
    before, calls = lines(drawer), len(draws)
    assert drawer.draw(PROMPTS, DRAWING) == drawn
    drawer.draw(PROMPTS[:3], dataclasses.replace(DRAWING, samples=1))
    assert len(draws) == calls
    assert lines(drawer) == before


def test_more_samples_keep_the_responses_that_are_there(drawer, drawn):
    drawer.draw(PROMPTS, dataclasses.replace(DRAWING, samples=1))
    before = lines(drawer)
    assert drawer.draw(PROMPTS, DRAWING) == drawn
    assert lines(drawer)[: len(before)] == before


def test_a_kill_loses_at_most_the_batch_in_which_it_came(drawer, drawn, draws, monkeypatch):
    two_prompts = 6  # responses, in batches of 8
    original = responses.generate

    def killed(*arguments, **how):
        if len(draws) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **how)

    monkeypatch.setattr(responses, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        drawer.draw(PROMPTS, DRAWING)
    assert len(lines(drawer)) == 3 * two_prompts
    (path,) = drawer.folder.glob(f"*/{FILE}")
    path.write_text(path.read_text()[:-10])  # the last line is torn
    monkeypatch.setattr(responses, "generate", original)
    assert drawer.draw(PROMPTS, DRAWING) == drawn
    assert sum(draws[3:]) == len(PROMPTS) - 3 * 2 + 1


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"max_new_tokens": 8}, {"seed": 6}, {"stop_text": "the"}]
)
def test_each_setting_has_responses_of_its_own(drawer, drawn, change):
    drawer.draw(PROMPTS, DRAWING)
    assert drawer.draw(PROMPTS, dataclasses.replace(DRAWING, **change)) != drawn
    assert len(list(drawer.folder.glob(f"*/{FILE}"))) == 2


@pytest.mark.slow
def test_another_policy_does_not_read_the_responses(drawer, drawn, tmp_path):
    drawer.draw(PROMPTS, DRAWING)
    other = load_policy(save_model(tmp_path / "other", seed=1))
    assert PolicyResponses(other, drawer.folder).draw(PROMPTS, DRAWING) != drawn


def test_greedy_responses_are_drawn_once_and_are_the_samplers(policy, drawer):
    greedy = drawer.draw(PROMPTS, dataclasses.replace(DRAWING, temperature=0.0))
    assert {len(of_prompt) for of_prompt in greedy} == {1}
    ids = prompt_ids(PROMPTS, policy.tokenizer)
    sampler = build_sampler(policy.model, max_new_tokens=9, stop=policy.stop)
    with jax.set_mesh(policy.mesh):
        samples = generate(sampler, policy.params, ids, batch_size=8, seed=0, temperature=0)
    for of_prompt, tokens, expected in zip(greedy, ids, samples):
        assert of_prompt[0].text == response_texts(policy.tokenizer, tokens, expected)[0]
        assert of_prompt[0].stopped == expected[0].stopped


def test_responses_cut_at_the_limit_are_counted(drawn):
    cut, ended = Response("a", False), Response("b", True)
    assert share_cut([[cut, ended], [cut, cut]]) == 0.75
    assert {one.stopped for of_prompt in drawn for one in of_prompt} == {True, False}
    assert not any(o.stopped for of_prompt in drawn for o in of_prompt if len(o.text.split()) == 9)


def test_a_response_ends_before_the_stop_text(drawer, drawn):
    word = next(one.text.split()[1] for of_prompt in drawn for one in of_prompt if one.text)
    ended = drawer.draw(PROMPTS, dataclasses.replace(DRAWING, stop_text=word))
    for of_prompt, whole in zip(ended, drawn):
        for one, before in zip(of_prompt, whole):
            assert one.text == before.text.partition(word)[0]
            assert one.stopped == (before.stopped or word in before.text)


def test_the_text_that_a_policy_reads_decides_the_response(drawer, drawn):
    reworded = drawer.draw(PROMPTS[:1], DRAWING, ["this is"])
    assert reworded != drawn[:1]
    assert drawer.draw(PROMPTS[:1], DRAWING, [PROMPTS[0].text]) == drawn[:1]


def test_more_samples_than_share_a_reading_are_drawn_in_blocks(drawer, draws, monkeypatch):
    monkeypatch.setattr(responses, "AT_ONCE", 3)
    many = drawer.draw(PROMPTS[:2], dataclasses.replace(DRAWING, samples=12))
    assert [len(of_prompt) for of_prompt in many] == [12, 12]
    assert sum(draws) == 8
    assert drawer.draw(PROMPTS[:2], dataclasses.replace(DRAWING, samples=7)) == [
        of_prompt[:7] for of_prompt in many
    ]
    blocks = {tuple(one.text for one in many[0][start : start + 3]) for start in range(0, 12, 3)}
    assert len(blocks) == 4  # none is drawn twice


def test_best_of_n_is_the_best_of_each_n_in_a_row():
    length = Reward("length", lambda prompts, texts: [len(text) for text in texts])
    texts = ["aa", "a", "aaa", "b", "bbbb", ""]
    (best,) = best_responses(["p"], [[Response(text, True) for text in texts]], 3, length)
    assert [one.text for one in best] == ["aaa", "bbbb"]
    (alone,) = best_responses(["p"], [[Response(text, True) for text in texts]], 1, None)
    assert [one.text for one in alone] == texts


def test_the_reward_of_best_of_n_reads_the_prompt():
    def agrees(prompts, texts):
        return [float(prompt == text) for prompt, text in zip(prompts, texts)]

    drawn = [[Response("a", True), Response("b", True)]] * 2
    best = best_responses(["a", "b"], drawn, 2, Reward("agrees", agrees))
    assert [[one.text for one in of_prompt] for of_prompt in best] == [["a"], ["b"]]


def test_the_embedded_prompts_are_long_enough_for_the_test_policy():
    assert all(len(reviews.tokenizer()(p.text)["input_ids"]) + 9 <= 32 for p in PROMPTS)
