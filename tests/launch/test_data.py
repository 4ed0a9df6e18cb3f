"""Training and held-out examples share no prompt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpojax.data import reviews
from dpojax.data.records import DataError
from dpojax.data.tokenise import Example
from dpojax.launch.data import hold_out, load


def example(prompt, response=(1,)):
    return Example("f:1", np.int32(prompt), (np.int32(response),), (False,), None)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.floats(0.05, 0.9))
def test_all_examples_of_a_prompt_fall_on_one_side_and_none_is_lost(prompts, share):
    examples = [example([7, p], [i + 1]) for i, p in enumerate(prompts)]
    train, test = hold_out(examples, share)
    assert not {int(e.prompt[1]) for e in train} & {int(e.prompt[1]) for e in test}
    assert len(train) + len(test) == len(examples)
    assert len({int(e.prompt[1]) for e in test}) == max(1, round(share * len(set(prompts))))


def test_texts_without_a_prompt_are_held_out_one_by_one():
    train, test = hold_out([example([1], [i]) for i in range(100)], 0.1)
    assert (len(train), len(test)) == (90, 10)


def test_the_embedded_task_gives_one_response_to_sft_and_two_to_dpo(tiny):
    config, tokenizer = tiny(), reviews.tokenizer()
    sft = load(config.sft.data, config.tokens, tokenizer, best_only=True, seed=0)
    dpo = load(config.dpo.data, config.tokens, tokenizer, best_only=False, seed=0)
    assert {len(e.responses) for e in sft.examples} == {1}
    assert {len(e.responses) for e in dpo.examples} == {2}
    assert (len(sft.held_out), len(dpo.held_out)) == (10, 10)
    assert not dpo.reports["train"].number("noted", "boundary_merge")


def test_a_file_with_one_prompt_cannot_be_split_and_says_so(tiny, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "the", "chosen": " film", "rejected": " plot"}\n' * 3)
    config = tiny(**{"dpo.data.source": str(path)})
    with pytest.raises(DataError, match=r"pairs\.jsonl: 0 examples to train on and 3 held out"):
        load(config.dpo.data, config.tokens, reviews.tokenizer(), best_only=False, seed=0)


def test_sft_on_preference_data_takes_the_best_response(tiny, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        f'{{"prompt": "the {word}", "chosen": " was good", "rejected": " was bad"}}'
        for word in ("film", "plot", "acting")
    ]
    path.write_text("\n".join(rows))
    config, tokenizer = tiny(**{"sft.data.source": str(path)}), reviews.tokenizer()
    data = load(config.sft.data, config.tokens, tokenizer, best_only=True, seed=0)
    texts = {tokenizer.decode(e.responses[0], skip_special_tokens=True) for e in data.examples}
    assert texts == {"was good"}
