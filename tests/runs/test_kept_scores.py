"""Scores that are kept beside responses: nothing is scored twice, whoever is killed."""

import json

import pytest

from dpojax import storage
from dpojax.evaluation.rewards import Reward
from dpojax.runs import kept_scores
from dpojax.runs.kept_scores import keep_scores
from dpojax.runs.responses import silent

PROMPTS, TEXTS = ["p", "q", "p", "pq"], ["a", "bb", "ccc", "r"]


class Counted:
    """Scores a text by the lengths of prompt and response, and keeps what it was asked."""

    def __init__(self, fingerprint="length"):
        self.asked, self.fails_at = [], None
        self.reward = Reward("length", self.score, fingerprint)

    def score(self, prompts, responses):
        if self.fails_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked += zip(prompts, responses)
        return [10 * len(prompt) + len(text) for prompt, text in zip(prompts, responses)]


@pytest.fixture
def folder(tmp_path):
    return storage.as_path(tmp_path / "drawing")


def kept(counted, folder):
    return keep_scores(counted.reward, folder, silent)


def test_the_scores_are_the_rewards_and_a_second_command_scores_nothing(folder):
    first, second = Counted(), Counted()
    expected = [11, 12, 13, 21]
    assert kept(first, folder)(PROMPTS, TEXTS).tolist() == expected
    assert kept(second, folder)(PROMPTS[::-1], TEXTS[::-1]).tolist() == expected[::-1]
    assert second.asked == []


def test_only_texts_that_were_not_scored_are_scored_each_once(folder):
    counted = Counted()
    kept(counted, folder)(PROMPTS[:2], TEXTS[:2])
    kept(counted, folder)(PROMPTS + PROMPTS, TEXTS + TEXTS)
    assert sorted(counted.asked) == sorted(zip(PROMPTS, TEXTS))


def test_where_the_prompt_ends_is_part_of_a_texts_name(folder):
    assert kept(Counted(), folder)(["p", "pq"], ["qr", "r"]).tolist() == [12, 21]


def test_a_kill_loses_the_scores_that_were_under_way(folder, monkeypatch):
    monkeypatch.setattr(kept_scores, "AT_ONCE", 2)
    killed, again = Counted(), Counted()
    killed.fails_at = 2
    with pytest.raises(KeyboardInterrupt):
        kept(killed, folder)(PROMPTS, TEXTS)
    (path,) = folder.glob("scores-*.jsonl")
    path.write_text(path.read_text()[:-3])  # the last line is torn
    assert kept(again, folder)(PROMPTS, TEXTS).tolist() == [11, 12, 13, 21]
    assert again.asked == [*zip(PROMPTS, TEXTS)][1:]


def test_another_reward_does_not_read_the_scores(folder):
    kept(Counted(), folder)(PROMPTS, TEXTS)
    other = Counted("other weights")
    kept(other, folder)(PROMPTS, TEXTS)
    assert len(other.asked) == len(TEXTS)


def test_scores_of_a_reward_that_nothing_tells_from_another_are_not_kept(folder):
    kept(Counted(""), folder)(PROMPTS, TEXTS)
    assert not folder.exists()


def test_a_line_that_is_no_score_is_left_out(folder):
    kept(Counted(), folder)(PROMPTS, TEXTS)
    (path,) = folder.glob("scores-*.jsonl")
    first, *others = path.read_text().splitlines()
    wrong = json.dumps(json.loads(first) | {"score": "high"})
    path.write_text("\n".join([wrong, *others]) + "\n")
    again = Counted()
    assert kept(again, folder)(PROMPTS, TEXTS).tolist() == [11, 12, 13, 21]
    assert again.asked == [(PROMPTS[0], TEXTS[0])]
