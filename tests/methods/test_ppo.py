"""PPO against a twin that knows no rows, no micro-batches and no custom gradients."""

import dataclasses
import functools
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax import sharding
from dpojax.methods import ppo
from dpojax.methods.ppo import PPO, Responses
from dpojax.methods.ppo.objectives import policy_objective, with_entropy
from dpojax.methods.ppo.update import _minibatches
from dpojax.models import decoder
from dpojax.models.attention import plain_rows
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.decoder import SHARDING_RULES
from dpojax.rl import AdaptiveKL
from dpojax.sampling import Prompts, Samples, build_sampler
from dpojax.sharding import make_mesh
from dpojax.training.state import make_optimizer

CONFIG = DecoderConfig(
    **LLAMA, vocab_size=12, width=16, layers=1, heads=2, kv_heads=2, mlp_width=32, max_positions=32
)
MODEL = decoder.build(CONFIG)
VALUE = decoder.build(dataclasses.replace(CONFIG, scalar_head=True))
STOP, WANTED = 1, 5
BATCH, P, T = 32, 4, 8
LEARNED = ("logprobs", "values", "advantages", "returns")
SETTINGS = PPO(epochs=2, minibatches=2)
ADAM = make_optimizer(
    SimpleNamespace(name="adamw", clip_norm=1.0, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8)
)
HYPER = ppo.hyper(
    learning_rate=1e-2, value_learning_rate=1e-2, missing_eos_penalty=0.5, gae_lambda=0.9
)
SAMPLER = build_sampler(MODEL, max_new_tokens=T, stop=(STOP,))


class Given(NamedTuple):
    """What `update` takes between the state and `hyper`, and what it was packed from."""

    reference: dict
    responses: Responses
    scores: jax.Array
    prompts: Prompts
    samples: Samples


@functools.cache
def noisy(model, seed):
    """Params with noise everywhere, so that no norm is one."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape) + (x.ndim < 3)), shapes)


@functools.cache
def new_state(optimizer=ADAM, devices=1):
    mesh = make_mesh(devices=jax.devices()[:devices])
    params = (
        jax.device_put(noisy(*of), sharding.replicated(mesh)) for of in ((MODEL, 0), (VALUE, 1))
    )
    options = {"seed": 3, "kl_coefficient": 0.1}
    return ppo.new_ppo_state(*params, optimizer, mesh, SHARDING_RULES, **options)


@pytest.fixture(scope="module")
def given():
    """32 prompts of 1 to 4 tokens, a response to each, and random scores."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, P + 1, BATCH).astype(np.int32)
    tokens = rng.integers(2, 12, (BATCH, P)).astype(np.int32)
    tokens = np.where(np.arange(P) < lengths[:, None], tokens, 0)
    prompts = Prompts(tokens, lengths, np.arange(BATCH, dtype=np.int32))
    samples = ppo.draw(SAMPLER, new_state(), prompts)
    assert 0 < samples.stopped.sum() < BATCH
    assert len({*np.asarray(samples.lengths).flat}) > 3
    scores = rng.normal(size=BATCH).astype(np.float32)
    samples = jax.device_get(samples)
    responses = ppo.pack(prompts, samples, multiple=SETTINGS.minibatches)
    assert (responses.rows.example >= 0).sum(-1).max() > 1
    return Given(noisy(MODEL, 2), responses, scores, prompts, samples)


@pytest.fixture(scope="module")
def update():
    return jax.jit(ppo.build_update(MODEL, VALUE, SETTINGS, ADAM))


@pytest.fixture(scope="module")
def experience(given):
    """What `build_experience` makes of the fixture, and its metrics."""
    prepare = jax.jit(ppo.build_experience(MODEL, VALUE, SETTINGS))
    return jax.device_get(prepare(new_state(), *given[:3], HYPER))


def texts(given):
    """Tokens [B, P + T] without a gap, and for each response (row, its columns)."""
    tokens = np.zeros((BATCH, P + T), np.int32)
    places = []
    for row, (prompt, length) in enumerate(zip(given.prompts.tokens, given.prompts.lengths)):
        count = int(given.samples.lengths[row, 0])
        tokens[row, :length] = prompt[:length]
        tokens[row, length : length + count] = given.samples.tokens[row, 0, :count]
        places.append(slice(length, length + count))
    return tokens, places


def full_logprobs(params, tokens):
    """log p of each token given those before it, [B, P + T], by all logits; the first is 0."""
    logits = decoder.logits(MODEL, params, plain_rows(tokens))
    logprobs = jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(tokens)[:, 1:, None], axis=-1
    )[..., 0]
    return jnp.pad(logprobs, ((0, 0), (1, 0)))


def full_values(params, tokens):
    """V before each token, [B, P + T]; the first is 0."""
    values = VALUE.scores(params, VALUE.apply(params, plain_rows(tokens)))
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


def in_columns(values, given, places):
    """By scored token [R, T] as by column of the texts, [B, P + T]."""
    values, found = by_response(values, given), np.zeros((BATCH, P + T), np.float32)
    for row, at in enumerate(places):
        found[row, at] = values[row, : at.stop - at.start]
    return found


def by_response(values, given):
    """By scored token [R, T] as by token of each response, [B, T]; one by one, with no scatter."""
    rows, found = given.responses.rows, np.zeros((BATCH, T), np.float32)
    for row, score in zip(*np.nonzero(rows.response >= 0)):
        owner = rows.example[row, rows.response[row, score]]
        before = given.prompts.lengths[owner]
        after = rows.positions[row, rows.source[row, score]] + 1 - before
        found[owner, after] = values[row, score]
    return found


def close(a, b, atol=1e-5):
    a, b = jax.device_get((a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), a, b)


def test_every_response_lies_behind_its_own_prompt_and_nothing_else_in_the_rows():
    rng = np.random.default_rng(4)
    lengths = np.array([2, 4, 1, 0], np.int32)  # the last is a dummy
    counts = np.array([[3, 1], [5, 4], [2, 7], [0, 0]], np.int32)
    tokens = rng.integers(2, 12, (4, 2, 7)).astype(np.int32)
    prompts = Prompts(rng.integers(2, 12, (4, 5)).astype(np.int32), lengths, np.arange(4))
    samples = Samples(tokens, *2 * [np.zeros(tokens.shape)], counts, counts % 2 > 0)
    found = ppo.pack(prompts, samples, multiple=2)
    rows, seen = found.rows, Counter()
    assert rows.tokens.shape == (4, 16)  # 34 tokens; one row each would be 6
    for row, segment in zip(*np.nonzero(rows.example >= 0)):
        number = rows.example[row, segment]
        own = rows.segment[row] == segment + 1
        said = tokens[number // 2, number % 2, : counts.flat[number]]
        text = [*prompts.tokens[number // 2, : lengths[number // 2]], *said]
        assert rows.tokens[row, own].tolist() == text
        assert rows.positions[row, own].tolist() == list(range(len(text)))
        mine = rows.response[row] == segment
        assert rows.target[row, mine].tolist() == said.tolist()
        assert rows.source[row, mine].tolist() == np.flatnonzero(own)[-len(said) - 1 : -1].tolist()
        assert found.place[row, mine].tolist() == [number * 7 + t for t in range(len(said))]
        seen[number] += 1
    assert seen == Counter(range(6))
    assert not np.any(rows.tokens[rows.segment == 0])
    assert (found.place[rows.response < 0] == 8 * 7).all()
    assert found.stopped.tolist() == (counts % 2 > 0).ravel().tolist()


def test_what_is_known_by_token_and_by_response_turn_into_each_other(given):
    responses = given.responses
    mask = responses.rows.response >= 0
    values = np.where(mask, np.random.default_rng(0).normal(size=mask.shape), 0).astype(np.float32)
    found = jax.jit(Responses.by_response)(responses, values)
    np.testing.assert_array_equal(found, by_response(values, given))
    np.testing.assert_array_equal(jax.jit(Responses.by_token)(responses, found), values)


def test_there_are_few_numbers_of_rows_and_all_are_multiples(given):
    shortened = lambda most: given.samples._replace(lengths=np.minimum(given.samples.lengths, most))
    for multiple, step in ((1, 4), (8, 8), (64, 64)):
        counts = [
            len(ppo.pack(given.prompts, shortened(most), multiple=multiple).rows.tokens)
            for most in range(1, T + 1)
        ]
        assert counts == sorted(counts)
        assert all(count % step == 0 for count in counts)
        assert counts[0] < counts[-1] or step == 64


def test_experience_is_what_loops_over_unpadded_texts_make(given, experience):
    found, metrics = experience
    tokens, places = texts(given)
    state = new_state()
    logprobs, reference = (
        np.asarray(jax.jit(full_logprobs)(params, tokens), np.float64)
        for params in (state.policy.params, given.reference)
    )
    values = np.asarray(jax.jit(full_values)(state.value.params, tokens), np.float64)
    advantages, returns, kls = [], [], []
    for row, at in enumerate(places):
        v, log_ratio = values[row, at], (logprobs - reference)[row, at]
        rewards = -0.1 * log_ratio
        rewards[-1] += float(given.scores[row]) - 0.5 * (not given.samples.stopped[row, 0])
        delta = rewards + np.append(v[1:], 0) - v
        ahead = range(len(v))
        own = [sum(0.9 ** (k - t) * delta[k] for k in ahead[t:]) for t in ahead]
        advantages.append(np.array(own))
        returns.append(np.array(own) + v)
        kls.append(log_ratio.sum())
    flat = np.concatenate(advantages)
    advantages = [(a - flat.mean()) / flat.std(ddof=1) for a in advantages]
    unpacked = {name: by_response(getattr(found, name), given) for name in LEARNED}
    for row, at in enumerate(places):
        n = at.stop - at.start
        for name, wanted in (
            ("logprobs", logprobs[row, at]),
            ("values", values[row, at]),
            ("advantages", advantages[row]),
            ("returns", returns[row]),
        ):
            field = unpacked[name][row]
            np.testing.assert_allclose(field[:n], wanted, atol=1e-4, err_msg=name)
            assert not np.any(field[n:])
    assert metrics["objective/kl"].value == pytest.approx(np.mean(kls), abs=1e-4)
    np.testing.assert_allclose(unpacked["logprobs"], given.samples.logprobs[:, 0], atol=1e-4)


@pytest.fixture(scope="module")
def gradients():
    """(experience) -> what one step of one minibatch takes off both models at a rate of 1."""
    settings, optimizer = PPO(epochs=1, minibatches=1), optax.identity()
    optimise = jax.jit(ppo.build_optimise(MODEL, VALUE, settings, optimizer))
    hyper = ppo.hyper(learning_rate=1.0, value_learning_rate=1.0, value_clip=0.1)

    def run(experience):
        old = new_state(optimizer)
        new, metrics, finite = optimise(old, experience, hyper)
        assert finite
        taken = jax.tree.map(jnp.subtract, old, new._replace(iteration=old.iteration))
        return taken.policy.params, taken.value.params, metrics

    return run


@pytest.mark.slow
def test_the_first_step_is_reinforce_with_the_advantages(given, experience, gradients):
    tokens, places = texts(given)
    weight = in_columns(experience[0].advantages, given, places)

    def reinforce(params):
        return -jnp.sum(weight * full_logprobs(params, tokens)) / given.samples.lengths.sum()

    policy, _, metrics = gradients(experience[0])
    close(policy, jax.jit(jax.grad(reinforce))(new_state().policy.params))
    assert abs(metrics["policy/approxkl_avg"].value) < 1e-6
    assert metrics["policy/clipfrac_avg"].value == 0


def test_later_steps_have_the_gradients_of_the_papers_losses(given, experience, gradients):
    rng = np.random.default_rng(6)
    mask = experience[0].response >= 0
    shift = lambda x: jnp.where(mask, x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), 0)
    moved = experience[0]._replace(
        logprobs=shift(experience[0].logprobs), values=shift(experience[0].values)
    )
    tokens, places = texts(given)
    old, weight, old_values, returns, inside = (
        in_columns(np.asarray(x), given, places)
        for x in (moved.logprobs, moved.advantages, moved.values, moved.returns, mask)
    )
    mean = lambda x: jnp.sum(inside * x) / given.samples.lengths.sum()

    def surrogate(params):
        ratio = jnp.exp(full_logprobs(params, tokens) - old)
        return -mean(jnp.minimum(ratio * weight, jnp.clip(ratio, 0.8, 1.2) * weight))

    def squares(params):
        v = full_values(params, tokens)
        held = old_values + jnp.clip(v - old_values, -0.1, 0.1)
        return mean(jnp.maximum((v - returns) ** 2, (held - returns) ** 2)) / 2

    policy, value, metrics = gradients(moved)
    state = new_state()
    loss, wanted = jax.jit(jax.value_and_grad(surrogate))(state.policy.params)
    close(policy, wanted)
    close(value, jax.jit(jax.grad(squares))(state.value.params))
    assert 0.1 < metrics["policy/clipfrac_avg"].value < 0.9
    assert metrics["loss/policy_avg"].value == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.slow
def test_the_entropy_bonus_is_the_mean_entropy_of_the_tokens(given, experience):
    tokens, places = texts(given)
    part, params = experience[0], new_state().policy.params

    @jax.jit
    def both(params):
        outputs = with_entropy(MODEL)(params, part)
        terms = [policy_objective(weight).terms(outputs, part, HYPER) for weight in (0.0, 0.3)]
        logprobs = jax.nn.log_softmax(decoder.logits(MODEL, params, plain_rows(tokens)))
        return terms, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)

    (without, with_bonus), entropy = both(params)
    wanted = [np.sum(own[at.start - 1 : at.stop - 1]) for own, at in zip(entropy, places)]
    by_row = [sum(wanted[i] for i in row if i >= 0) for row in given.responses.rows.example]
    np.testing.assert_allclose((without.loss - with_bonus.loss)[:, 0] / 0.3, by_row, rtol=1e-4)
    mean = with_bonus.metrics["objective/entropy"]
    assert float(mean.total.sum() / mean.weight.sum()) == pytest.approx(
        np.sum(wanted) / given.samples.lengths.sum(), rel=1e-4
    )


@pytest.mark.slow
def test_padding_and_dummy_prompts_change_nothing(given, experience):
    front = lambda x, columns: np.pad(x, ((8, 0), *[(0, 0)] * (np.ndim(x) - 2), (0, columns)))
    prompts = Prompts(
        front(given.prompts.tokens, 3), *(np.pad(x, (8, 0)) for x in given.prompts[1:])
    )
    samples = Samples(
        *(front(x, 1) for x in given.samples[:3]), *(front(x, 0) for x in given.samples[3:])
    )
    responses = ppo.pack(prompts, samples, multiple=2)
    scores = np.pad(given.scores, (8, 0), constant_values=np.nan)
    prepare = jax.jit(ppo.build_experience(MODEL, VALUE, SETTINGS))
    found, metrics = prepare(new_state(), given.reference, responses, scores, HYPER)
    wanted, same = experience
    for name in LEARNED:
        mine = np.asarray(responses.by_response(getattr(found, name)))
        close(mine[8:, :T], by_response(getattr(wanted, name), given))
        assert not np.any(mine[:8])
        assert not np.any(mine[:, T:])
    close(metrics, same)


@pytest.mark.long
def test_neither_devices_nor_micro_batches_change_an_update(given):
    plain = optax.identity()  # Adam would blow up the rounding of gradients that are almost 0
    in_parts = dataclasses.replace(SETTINGS, micro_batches=2)
    update, again = (
        jax.jit(ppo.build_update(MODEL, VALUE, settings, plain))
        for settings in (SETTINGS, in_parts)
    )
    once, report = update(new_state(plain), *given[:3], HYPER)
    responses = ppo.pack(given.prompts, given.samples, multiple=2 * 2 * 8)
    assert len(responses.rows.tokens) > len(given.responses.rows.tokens)
    with jax.set_mesh(make_mesh()):
        state, reference = new_state(plain, devices=8), jax.device_get(given.reference)
        other, same = again(state, reference, responses, given.scores, HYPER)
    close(once.policy.params, other.policy.params)
    close(once.value.params, other.value.params)
    close(report.metrics, same.metrics, atol=1e-4)
    assert int(once.policy.step) == 4
    assert int(once.iteration) == 1


def test_minibatches_share_the_rows_evenly_and_every_epoch_otherwise(given):
    present = jnp.asarray(np.arange(24) < 21)[:, None, None]
    settings = PPO(epochs=3, minibatches=4, micro_batches=2)
    order = np.asarray(_minibatches(new_state(), present, settings)).reshape(3, 4, 6)
    for epoch in order:
        assert sorted(epoch.ravel()) == list(range(24))
        assert sorted((epoch < 21).sum(-1)) == [5, 5, 5, 6]
        assert all((np.diff((own < 21).astype(int)) <= 0).all() for own in epoch)  # dummies last
    assert len({tuple(epoch.ravel()) for epoch in order}) == 3


@pytest.mark.slow
def test_warm_up_trains_the_value_model_alone(given, update):
    state = new_state()
    hyper = HYPER | {"value_warmup": jnp.float32(1), "kl_horizon": jnp.float32(10.0)}
    new, _ = update(state, *given[:3], hyper)
    close(new.policy, state.policy, atol=0)
    assert new.kl == state.kl
    assert int(new.value.step) == 4
    then, _ = update(new, *given[:3], hyper)
    assert int(then.policy.step) == 4
    assert then.kl != state.kl


@pytest.mark.slow
def test_the_coefficient_follows_the_kl_by_zieglers_rule(given, update):
    hyper = HYPER | {"kl_target": jnp.float32(1e3), "kl_horizon": jnp.float32(1000.0)}
    new, report = update(new_state(), *given[:3], hyper)
    assert report.metrics["objective/kl"].value < 800
    assert float(new.kl.coefficient) == pytest.approx(0.1 * (1 - 0.2 * BATCH / 1000))


@pytest.mark.slow
def test_an_iteration_ends_where_the_policy_has_gone_too_far(given, update):
    new, _ = update(new_state(), *given[:3], HYPER | {"max_kl": jnp.float32(1e-4)})
    assert int(new.policy.step) == int(new.value.step) == 2  # the second finds it moved


@pytest.mark.slow
def test_a_score_that_is_not_finite_is_named_and_leaves_the_models(given, update):
    state = new_state()
    scores = np.where(np.arange(BATCH) == 3, np.float32(np.nan), given.scores)
    new, report = update(state, *given._replace(scores=scores)[:3], HYPER)
    assert not report.finite
    assert np.flatnonzero(report.bad).tolist() == [3]
    close((new.policy, new.value, new.kl), (state.policy, state.value, state.kl), atol=0)


def test_a_value_model_starts_as_the_policys_trunk_and_says_zero(given):
    policy = jax.device_put(noisy(MODEL, 0))
    config, value = ppo.with_value_head(CONFIG, policy)
    assert config.scalar_head
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a is not b and (a == b).all(), value["blocks"], policy["blocks"])
    )
    hidden = jnp.ones((2, CONFIG.width))
    assert not np.any(VALUE.scores(value, hidden))


@pytest.mark.slow
@pytest.mark.parametrize("coefficient", [0.01, 20.0])
def test_the_reward_rises_unless_the_kl_costs_too_much(given, update, coefficient):
    """The reward is the share of one token in the 8 that a response may have."""
    state = new_state()
    reference, start = jax.device_get(state.policy.params), state.kl.coefficient
    state = state._replace(kl=AdaptiveKL(start * coefficient / start))
    hyper = ppo.hyper(learning_rate=2e-2, value_learning_rate=2e-2)
    rewards, kls = [], []
    for _ in range(12):
        samples = jax.device_get(ppo.draw(SAMPLER, state, given.prompts))
        scores = np.float32((samples.tokens[:, 0] == WANTED).sum(-1) / T)
        # 64 rows, however long the responses are: each other number would compile anew.
        responses = ppo.pack(given.prompts, samples, multiple=64)
        state, report = update(state, reference, responses, scores, hyper)
        rewards.append(float(scores.mean()))
        kls.append(report.metrics["objective/kl"].value)
    if coefficient < 1:
        assert rewards[0] < 0.15
        assert rewards[-1] > 0.5
        assert kls[-1] > 3
    else:
        assert max(rewards[2:]) < 0.1
        assert abs(kls[-1]) < 0.3


def test_settings_that_cannot_be_are_refused(given):
    with pytest.raises(ValueError, match="minibatches: must be positive, got 0"):
        PPO(minibatches=0)
    with pytest.raises(ValueError, match="entropy: must not be negative"):
        PPO(entropy=-0.1)
    update = ppo.build_update(MODEL, VALUE, PPO(minibatches=5), ADAM)
    with pytest.raises(ValueError, match=r"rows cannot be cut into 5 minibatches.*multiple=5"):
        jax.eval_shape(update, new_state(), *given[:3], HYPER)
