"""Laws of the sampler: it draws from the model's own distribution, whatever the batch and mesh."""

import dataclasses
import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from scipy import stats

from dpojax.data import reviews
from dpojax.logprobs import token_logprobs
from dpojax.models import decoder, huggingface
from dpojax.models.attention import plain_rows
from dpojax.models.config import GPT2, LLAMA, DecoderConfig, Rope
from dpojax.models.decoder import SHARDING_RULES
from dpojax.runs.command import exit_status
from dpojax.sampling import (
    Prompts,
    Samples,
    batches,
    build_sampler,
    generate,
    pad,
    truncate,
)
from dpojax.sampling import (
    sampler as sampler_module,
)
from dpojax.sharding import make_mesh, tree_shardings
from tests import further

SIZES = {"vocab_size": 40, "width": 16, "layers": 2, "heads": 4, "mlp_width": 32}
SIZES |= {"max_positions": 64}
CONFIGS = {
    "llama": DecoderConfig(**LLAMA, **SIZES, kv_heads=2),
    "gpt2": DecoderConfig(**GPT2, **SIZES, tied_head=False),
    "gemma2": DecoderConfig(
        **LLAMA | {"norm_offset": 1.0, "post_norms": True, "tied_head": True},
        **SIZES,
        kv_heads=2,
        windows=(5, None),
        local_rope=Rope(theta=100.0),
        embedding_scale=4.0,
        attention_softcap=2.0,
        head_softcap=3.0,
    ),
    "gptj": DecoderConfig(
        **GPT2 | {"positions": "rope", "rope": Rope(dim=2, interleaved=True), "tied_head": False},
        **SIZES,
        residual="parallel_one_norm",
        head_bias=True,
    ),
}
NEW = 12
HOW = {"seed": 5, "temperature": 0.7}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 38]]


def random_params(config, seed=0):
    """Noise everywhere, so that no norm is one and no bias zero."""
    shapes = jax.eval_shape(decoder.build(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def leaf(keys, shape):
        center = 1.0 if keys[-1].key == "scale" else 0.0
        return jnp.asarray(center + 0.3 * rng.standard_normal(shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def sampler_of(family):
    """A sampler of NEW tokens and params of a tiny model."""
    config = CONFIGS[family]
    return build_sampler(decoder.build(config), max_new_tokens=NEW), random_params(config)


@pytest.fixture(scope="module")
def llama():
    """(sampler, params, draws for PROMPTS): three samples each at temperature 0.7."""
    sampler, params = sampler_of("llama")
    return sampler, params, generate(sampler, params, PROMPTS, batch_size=3, **HOW, samples=3)


def same_tokens(one, other):
    """Two lists of prompts' samples hold the same tokens."""
    ids = lambda responses: [
        [sample.tokens.tolist() for sample in of_prompt] for of_prompt in responses
    ]
    assert ids(one) == ids(other)


def full_texts(responses):
    """Prompts with their responses [texts, longest], and the columns that predict these."""
    texts = [
        (prompt, sample) for prompt, of_prompt in zip(PROMPTS, responses) for sample in of_prompt
    ]
    tokens = np.zeros((len(texts), max(map(len, PROMPTS)) + NEW), np.int32)
    for row, (prompt, sample) in enumerate(texts):
        tokens[row, : len(prompt) + NEW] = [*prompt, *sample.tokens]
    sources = np.array([len(prompt) - 1 + np.arange(NEW) for prompt, _ in texts])
    return tokens, sources, [sample for _, sample in texts]


@pytest.mark.parametrize("family", ["llama", "gemma2", *further("gpt2", "gptj")])
def test_greedy_is_the_argmax_of_a_full_forward_pass_token_by_token(family):
    sampler, params = sampler_of(family)
    responses = generate(
        sampler, params, PROMPTS, batch_size=3, seed=0, temperature=0, top_p=0.5, samples=3
    )
    tokens, sources, samples = full_texts(responses)
    logits = jax.jit(lambda params, rows: decoder.logits(sampler.model, params, rows))
    logits = np.asarray(logits(params, plain_rows(tokens)))
    logits_at_sources = np.take_along_axis(logits, sources[..., None], axis=1)
    np.testing.assert_array_equal(
        [sample.tokens for sample in samples], logits_at_sources.argmax(-1)
    )
    assert not any(sample.behaviour.any() for sample in samples)
    assert len({*logits_at_sources.argmax(-1).flat}) > 3


def test_log_probs_are_those_that_training_computes(llama):
    sampler, params, responses = llama
    tokens, sources, samples = full_texts(responses)

    @jax.jit
    def expected(params):
        hidden, head = sampler.model.apply(params, plain_rows(tokens)), sampler.model.head(params)
        hidden = jnp.take_along_axis(hidden, jnp.asarray(sources)[..., None], axis=1)
        targets = jnp.asarray(np.stack([sample.tokens for sample in samples]))
        return [token_logprobs(hidden / t, head, targets) for t in (1.0, HOW["temperature"])]

    policy, behaviour = expected(params)
    np.testing.assert_allclose([sample.logprobs for sample in samples], policy, atol=1e-4)
    np.testing.assert_allclose([sample.behaviour for sample in samples], behaviour, atol=1e-4)


def test_batch_order_and_number_of_samples_change_no_draw(llama):
    sampler, params, responses = llama
    alone = generate(sampler, params, PROMPTS, batch_size=1, **HOW)
    same_tokens(alone, [of_prompt[:1] for of_prompt in responses])
    order = [2, 0, 1]
    shuffled = [PROMPTS[i] for i in order]
    again = generate(sampler, params, shuffled, batch_size=3, ids=order, samples=3, **HOW)
    same_tokens(again, [responses[i] for i in order])


def test_every_seed_prompt_id_sample_and_place_draws_anew(llama):
    sampler, params, responses = llama
    same_prompt = [PROMPTS[0]] * 2
    how = {"batch_size": 3, "temperature": 0.7, "samples": 3}
    drawn = [generate(sampler, params, same_prompt, seed=seed, **how) for seed in (5, 6)]
    texts = {tuple(s.tokens) for batch in drawn for samples in batch for s in samples}
    assert len(texts) == 12
    same_tokens(drawn[0][:1], responses[:1])
    assert all(len(set(text)) > 2 for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"data": 4, "tensor": 2}, *further({"data": 2, "fsdp": 4})])
def test_eight_devices_draw_what_one_draws(llama, shape):
    sampler, params, responses = llama
    mesh = make_mesh(**shape)
    placed = jax.device_put(params, tree_shardings(params, mesh, SHARDING_RULES))
    with jax.set_mesh(mesh):
        meshed = generate(sampler, placed, PROMPTS, batch_size=8, **HOW, samples=3)
    same_tokens(responses, meshed)
    for a, b in zip(itertools.chain(*responses), itertools.chain(*meshed)):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_a_response_ends_with_its_first_stop_token_and_zeros_follow(llama):
    sampler, params, responses = llama
    stop = (int(responses[0][0].tokens[3]), int(responses[2][1].tokens[6]))
    stopping = build_sampler(sampler.model, max_new_tokens=NEW, stop=stop)
    drawn = jax.device_get(stopping(params, pad(PROMPTS, range(3), 4), **HOW, samples=3))
    lengths = set()
    for prompt, number in itertools.product(range(3), range(3)):
        free, ended = responses[prompt][number], Samples(*(x[prompt, number] for x in drawn))
        hits = np.flatnonzero(np.isin(free.tokens, stop))
        length = hits[0] + 1 if len(hits) else NEW
        assert (ended.lengths, ended.stopped) == (length, bool(len(hits)))
        np.testing.assert_array_equal(ended.tokens[:length], free.tokens[:length])
        np.testing.assert_allclose(ended.logprobs[:length], free.logprobs[:length], atol=1e-5)
        assert not np.any([x[length:].any() for x in ended[:3]])
        lengths.add(int(length))
    assert len(lengths) > 1
    dummy = [x[3] for x in drawn]
    assert not np.any([x.any() for x in dummy])


@pytest.mark.slow
def test_responses_that_go_on_without_those_that_stopped_draw_the_same(llama, monkeypatch):
    sampler, params, responses = llama
    stop = (int(responses[0][0].tokens[3]), int(responses[2][1].tokens[6]))
    stopping = build_sampler(sampler.model, max_new_tokens=NEW, stop=stop)
    whole = generate(stopping, params, PROMPTS, batch_size=3, **HOW, samples=3)
    monkeypatch.setattr(batches, "FIRST_REBATCH_TOKENS", 6)
    calls = []
    pad_batch = lambda prompts, *rest: calls.append(len(prompts)) or pad(prompts, *rest)
    monkeypatch.setattr(batches, "pad", pad_batch)
    gathered = generate(stopping, params, PROMPTS, batch_size=3, **HOW, samples=3)
    same_tokens(gathered, whole)
    for a, b in zip(itertools.chain(*gathered), itertools.chain(*whole)):
        assert a.stopped == b.stopped
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        np.testing.assert_allclose(a.behaviour, b.behaviour, atol=1e-4)
    # All prompts at first, then the responses of more than 6 tokens alone.
    longer = sum(len(s.tokens) > 6 or not s.stopped for of_prompt in whole for s in of_prompt)
    assert calls[0] == len(PROMPTS)
    assert 0 < sum(calls[1:]) == longer < 3 * len(PROMPTS)


def bigram_table(config, params, prompt):
    """log p(first), log p(second | first) from full forward passes."""
    model = decoder.build(config)
    forward = jax.jit(lambda params, rows: decoder.logits(model, params, rows))
    ids = np.arange(config.vocab_size)
    rows = np.concatenate([np.tile(prompt, (len(ids), 1)), ids[:, None]], axis=1)
    logits = forward(params, plain_rows(rows))
    return np.asarray(logits[0, -2], float), np.asarray(logits[:, -1], float)


def softmax(logits):
    mass = np.exp(logits - logits.max(-1, keepdims=True))
    return mass / mass.sum(-1, keepdims=True)


def truncated(logits, temperature, top_k, top_p):
    """The distribution by sorting: the twin of what the sampler does by bisection."""
    p = softmax(logits / temperature)
    order = np.argsort(-p)
    allowed = order[: top_k or len(p)]
    before = np.concatenate([[0], np.cumsum(p[allowed] / p[allowed].sum())[:-1]])
    allowed = allowed[before < top_p] if top_p < 1 else allowed
    out = np.zeros_like(p)
    out[allowed] = p[allowed] / p[allowed].sum()
    return out


@pytest.fixture(scope="module")
def two_tokens():
    """A vocabulary of 6, and 4,000 draws of two tokens as a function of how."""
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=6)
    params, prompt = random_params(config, seed=3), [2, 5, 1]
    sampler = build_sampler(decoder.build(config), max_new_tokens=2)
    batch = Prompts(
        np.tile(np.array(prompt, np.int32), (40, 1)),
        np.full(40, len(prompt), np.int32),
        np.arange(40, dtype=np.int32),
    )
    draws = lambda **how: sampler(params, batch, samples=100, seed=11, **how)
    return draws, *bigram_table(config, params, prompt)


@pytest.mark.parametrize(
    "how",
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (1.5, 4, 0.8)],
    ids=["plain", "temperature", "top_k", "top_p", "all"],
)
def test_four_thousand_draws_pass_a_chi_square_test(two_tokens, how):
    draws, first, second = two_tokens
    drawn = draws(temperature=how[0], top_k=how[1], top_p=how[2])
    pairs = np.asarray(drawn.tokens).reshape(-1, 2)
    p_first = truncated(first, *how)
    p = p_first[:, None] * np.stack([truncated(row, *how) for row in second])
    counts = np.zeros_like(p)
    np.add.at(counts, tuple(pairs.T), 1)
    assert not counts[p == 0].any()
    for expected, observed in ((p_first, counts.sum(1)), (p, counts)):
        possible = expected > 0
        expected_counts, observed_counts = len(pairs) * expected[possible], observed[possible]
        rare = expected_counts < 5
        if rare.any():
            expected_counts = np.append(expected_counts[~rare], expected_counts[rare].sum())
            observed_counts = np.append(observed_counts[~rare], observed_counts[rare].sum())
        assert len(expected_counts) > 1
        assert stats.chisquare(observed_counts, expected_counts).pvalue > 1e-3
    behaviour = np.asarray(drawn.behaviour).reshape(-1, 2).sum(1)
    np.testing.assert_allclose(behaviour, np.log(p[tuple(pairs.T)]), atol=1e-4)
    plain = softmax(first)[:, None] * softmax(second)
    logprobs = np.asarray(drawn.logprobs).reshape(-1, 2).sum(1)
    np.testing.assert_allclose(logprobs, np.log(plain[tuple(pairs.T)]), atol=1e-4)


def test_truncation_is_that_of_a_sort_for_random_logits():
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((200, 33))).astype(np.float32)
    cut = jax.jit(truncate)
    for top_k, top_p in [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.9), (0, 1e-6), (12, 0.5), (99, 0.99)]:
        cut_logits = np.asarray(cut(logits, jnp.int32(top_k), jnp.float32(top_p)))
        expected = np.stack([truncated(row.astype(float), 1.0, top_k, top_p) for row in logits])
        np.testing.assert_array_equal(np.isfinite(cut_logits), expected > 0)
        np.testing.assert_array_equal(cut_logits[expected > 0], logits[expected > 0])


def test_equal_logits_stay_together_under_truncation():
    logits = jnp.array([[2.0, 1.0, 1.0, -3.0]])
    stays = jnp.isfinite(truncate(logits, jnp.int32(2), jnp.float32(1.0)))
    assert stays.tolist() == [[True, True, True, False]]


def test_an_extreme_temperature_gives_numbers(two_tokens):
    draws, first, second = two_tokens
    greedy = [first.argmax(), second[first.argmax()].argmax()]
    cold = draws(temperature=1e-30)
    assert (cold.tokens == jnp.array(greedy)[None, None]).all()
    for drawn in (cold, draws(temperature=1e30)):
        assert jnp.isfinite(drawn.logprobs).all()
        assert jnp.isfinite(drawn.behaviour).all()


def test_weights_cast_once_are_those_that_every_call_casts():
    config = CONFIGS["llama"]
    model, params = decoder.build(config, compute_dtype=jnp.bfloat16), random_params(config)
    rows = plain_rows(np.array([PROMPTS[0]], np.int32))
    both = jax.jit(lambda params: [model.apply(p, rows) for p in (params, model.cast(params))])
    plain, cast = both(params)
    np.testing.assert_array_equal(np.asarray(plain, np.float32), np.asarray(cast, np.float32))
    assert model.cast(params)["blocks"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert model.cast(params)["final_norm"]["scale"].dtype == jnp.float32


@pytest.mark.slow
def test_a_cache_that_grows_draws_the_same(llama, monkeypatch):
    sampler, params, responses = llama
    monkeypatch.setattr(sampler_module, "FIRST_CACHE_TOKENS", 5)  # then 10 and 12
    fresh = build_sampler(decoder.build(sampler.model.config), max_new_tokens=NEW)
    again = generate(fresh, params, PROMPTS, batch_size=3, **HOW, samples=3)
    same_tokens(responses, again)


def test_greedy_is_what_transformers_generates(tmp_path, llama):
    torch = pytest.importorskip("torch", reason="transformers generates with torch")
    transformers = pytest.importorskip("transformers")
    sampler, params, _ = llama
    huggingface.save(tmp_path / "model", sampler.model.config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for prompt, (ours, *_) in zip(
        PROMPTS, generate(sampler, params, PROMPTS, batch_size=3, seed=0, temperature=0, samples=3)
    ):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            out = theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=NEW,
                pad_token_id=0,
            )
        assert out[0, len(prompt) :].tolist() == ours.tokens.tolist()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1: it is empty"),
        ([[1], [1, 40]], "prompt 1: it has an id outside 0 .. 39"),
        ([[1], [2], [1] * 53], "prompt 2: 53 tokens and 12 new ones, but the model has 64"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_named(llama, prompts, message):
    sampler, params, _ = llama
    with pytest.raises(ValueError, match=message):
        generate(sampler, params, prompts, batch_size=2, seed=0)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"samples": 0}]
)
def test_a_number_out_of_its_range_is_named(llama, wrong):
    sampler, params, _ = llama
    with pytest.raises(sampler_module.SamplingError, match=next(iter(wrong))):
        generate(sampler, params, PROMPTS, batch_size=3, seed=0, **wrong)


@pytest.fixture(scope="module")
def script():
    """The command `sample`; its flags are defined when it is imported."""
    return importlib.import_module("dpojax.commands.sample")


def run_script(script, *arguments):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["sample.py", *arguments])
    return exit_status(script.main)


@pytest.mark.slow
def test_the_script_prints_models_side_by_side(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    tokenizer = reviews.tokenizer()
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=len(tokenizer), layers=1)
    for seed, name in enumerate("ab"):
        params = random_params(config, seed)
        huggingface.save(tmp_path / name, config, params, tokenizer=tokenizer)
    prompt = reviews.prompts("train", 1, 0)[0]
    monkeypatch.chdir(tmp_path)
    arguments = ["--model=a", "--model=b", f"--prompt={prompt}"]
    assert run_script(script, *arguments, "--samples=2", "--max_new_tokens=8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 50 for line in lines)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if "|" in line]
    assert cells[0] == ["a", "b"]
    assert lines.count("sample 1") == lines.count("sample 2") == 1
    known = {*tokenizer.get_vocab(), "[..]", ""}
    columns = [" ".join(column).split() for column in zip(*cells[1:])]
    assert columns[0] != columns[1]
    assert all(known.issuperset(words) and len(words) > 4 for words in columns)


def test_the_script_reads_prompts_from_the_home_folder(script, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("b é\n\nc\n", encoding="utf-8")
    seen = []
    monkeypatch.setattr(script, "respond", lambda name, prompts: seen.append(prompts) or [[]] * 3)
    assert run_script(script, "--model=x", "--prompt=a", "--prompts=~/prompts.txt") == 0
    assert seen == [["a", "b é", "c"]]
    assert run_script(script, "--model=x", "--prompts=~/nothing.txt") == 1


def test_the_script_tells_errors_on_one_line(script, tmp_path, capsys):
    assert run_script(script, f"--model={tmp_path}", "--prompt=a") == 1
    assert run_script(script, f"--model={tmp_path}:preference", "--prompt=a") == 1
    errors = list(filter(None, capsys.readouterr().err.splitlines()))
    assert len(errors) == 2
    for error, start, part in zip(
        errors, ("FileNotFoundError", "ConfigError"), ("config.json", "not the workdir of a run")
    ):
        assert error.startswith(start)
        assert part in error
