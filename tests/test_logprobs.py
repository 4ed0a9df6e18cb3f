"""The chunked path against its plain twin, and the twin against torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from dpojax import sharding
from dpojax.logprobs import (
    Head,
    logits_at_once,
    logits_of,
    perturbed_logprobs,
    sum_by_response,
    token_kl,
    token_logprobs,
    token_logprobs_and_entropy,
    token_logprobs_plain,
    token_statistics,
    weight_gradient,
)
from dpojax.planning.hlo import collectives

ROWS, TOKENS, WIDTH, VOCABULARY = 2, 7, 8, 23


def problem(seed=0, *, bias=True, scale=0.5, softcap=3.0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    head = Head(normal(VOCABULARY, WIDTH), normal(VOCABULARY) if bias else None, scale, softcap)
    targets = jnp.asarray(rng.integers(0, VOCABULARY, (ROWS, TOKENS)))
    return normal(ROWS, TOKENS, WIDTH), head, targets


@partial(jax.jit, static_argnums=(0, 1, 2))
def jitted_value_and_gradients(function, scale, softcap, hidden, weight, bias, targets):
    def total(hidden, weight, bias):
        values = function(hidden, Head(weight, bias, scale, softcap), targets)
        weights = jnp.linspace(-1, 1, values.size).reshape(values.shape)
        return jnp.sum(weights * values), values

    argnums = (0, 1) if bias is None else (0, 1, 2)
    gradients, values = jax.grad(total, argnums, has_aux=True)(hidden, weight, bias)
    return values, gradients


def value_and_gradients(function, hidden, head, targets):
    arrays = hidden, head.weight, head.bias, targets
    return jitted_value_and_gradients(function, head.scale, head.softcap, *arrays)


def with_entropy_plain(hidden, head, targets):
    """Log-prob and entropy, [2, rows, tokens], through the full logits."""
    logprobs = jax.nn.log_softmax(logits_of(hidden, head), axis=-1)
    target_logprobs = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return jnp.stack([target_logprobs, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)])


def with_entropy(hidden, head, targets, **options):
    return jnp.stack(token_logprobs_and_entropy(hidden, head, targets, **options)[:2])


TWINS = pytest.mark.parametrize(
    ("by_parts", "plain"),
    [(token_logprobs, token_logprobs_plain), (with_entropy, with_entropy_plain)],
    ids=["log-probs", "with entropies"],
)


@TWINS
@pytest.mark.parametrize("max_logits", [10**9, 100, 1], ids=["one chunk", "several", "one token"])
@pytest.mark.parametrize(
    "kind", [{}, {"bias": False, "scale": None, "softcap": None}], ids=["full head", "plain head"]
)
def test_chunked_values_and_gradients_equal_the_plain_twin(max_logits, kind, by_parts, plain):
    hidden, head, targets = problem(**kind)
    want = value_and_gradients(plain, hidden, head, targets)
    got = value_and_gradients(partial(by_parts, max_logits=max_logits), hidden, head, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), got, want)


def test_parts_that_fit_a_cpus_cache_equal_the_plain_twin():
    """Three of 1,024 words, the last of which repeats some; their logits are stored."""
    keys = jax.random.split(jax.random.key(7), 3)
    hidden = jax.random.normal(keys[0], (2, 1024, WIDTH))
    head = Head(jax.random.normal(keys[1], (3000, WIDTH)), softcap=5.0)
    targets = jax.random.randint(keys[2], (2, 1024), 0, 3000)
    of_weight = lambda weight: with_entropy(hidden, head._replace(weight=weight), targets)
    assert "scan" in str(jax.make_jaxpr(of_weight)(head.weight))
    want = value_and_gradients(with_entropy_plain, hidden, head, targets)
    got = value_and_gradients(with_entropy, hidden, head, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), got, want)


def test_the_gradient_of_an_entropy_keeps_no_copies_of_parts_of_the_head():
    hidden, head, targets = problem(bias=False, softcap=None)
    weight = jnp.tile(head.weight, (2, 1))[:24]

    def program(function) -> str:  # of four parts of six words
        total = lambda h, w: function(h, Head(w), targets, max_logits=targets.size * 6).entropy
        return str(jax.make_jaxpr(jax.grad(lambda h, w: total(h, w).sum(), (0, 1)))(hidden, weight))

    copies, stored_logits = f"f32[4,6,{WIDTH}]", f"f32[4,{ROWS},{TOKENS},6]"
    plainly = program(token_statistics)
    assert copies in plainly
    assert stored_logits in plainly
    ours = program(token_logprobs_and_entropy)
    assert copies not in ours
    assert stored_logits not in ours


def test_log_probs_equal_torch():
    torch = pytest.importorskip("torch", reason="compares with torch")
    hidden, head, targets = problem(1, scale=None, softcap=None)
    as_torch = lambda x: torch.tensor(np.asarray(x))
    logits = as_torch(hidden) @ as_torch(head.weight).T + as_torch(head.bias)
    want = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), as_torch(targets).long().flatten(), reduction="none"
    )
    got = token_logprobs(hidden, head, targets)
    np.testing.assert_allclose(got.ravel(), want.numpy(), atol=2e-6)


def test_no_array_of_all_logits_exists_in_the_chunked_gradient():
    hidden, head, targets = problem(bias=False)
    loss = lambda h, w: token_logprobs(h, Head(w), targets, max_logits=2 * VOCABULARY).sum()
    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head.weight).as_text()
    assert f"x{TOKENS}x{VOCABULARY}x" not in text
    full = lambda h, w: token_logprobs_plain(h, Head(w), targets).sum()
    assert f"x{TOKENS}x{VOCABULARY}x" in jax.jit(full).lower(hidden, head.weight).as_text()


def test_bfloat16_hidden_states_give_float32_log_probs_and_float32_head_gradients():
    hidden, head, targets = problem(bias=False, softcap=None)
    half = hidden.astype(jnp.bfloat16)
    got, (d_hidden, d_weight) = value_and_gradients(token_logprobs, half, head, targets)
    assert (got.dtype, d_hidden.dtype, d_weight.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    want = token_logprobs_plain(hidden, head, targets)
    np.testing.assert_allclose(got, want, atol=0.1)


@pytest.mark.parametrize("max_logits", [10**9, 60])
def test_statistics_and_kl_are_those_of_the_full_distribution(max_logits):
    hidden, head, targets = problem(2)
    other, reference_head, _ = problem(3)
    logits = lambda h, head: 3 * np.tanh((0.5 * (h @ head.weight.T) + head.bias) / 3)
    p_logits = logits(*map(np.asarray, (hidden,)), jax.tree.map(np.asarray, head))
    q_logits = logits(*map(np.asarray, (other,)), jax.tree.map(np.asarray, reference_head))
    p = np.exp(p_logits) / np.exp(p_logits).sum(-1, keepdims=True)
    q = np.exp(q_logits) / np.exp(q_logits).sum(-1, keepdims=True)
    got = token_statistics(hidden, head, targets, max_logits=max_logits)
    np.testing.assert_allclose(got.entropy, -(p * np.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(got.mean_logit, p_logits.mean(-1), atol=1e-5)
    np.testing.assert_array_equal(got.correct, p.argmax(-1) == np.asarray(targets))
    kl = token_kl(hidden, head, other, reference_head, max_logits=max_logits)
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(-1), atol=1e-5)


@pytest.mark.parametrize("max_logits", [10**9, 60])
def test_perturbed_log_probs_are_those_of_the_perturbed_logits(max_logits):
    hidden, head, targets = problem(2)
    other, reference_head, _ = problem(3)
    both = (hidden, head), (other, reference_head)
    z, z_reference = (np.float64(logits_of(*one)) for one in both)
    perturbed = partial(perturbed_logprobs, *both[0], *both[1], targets, max_logits=max_logits)
    got = perturbed(epsilon=0.2)
    for values, logits in zip(got, (1.2 * z - 0.2 * z_reference, 0.8 * z + 0.2 * z_reference)):
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
        np.testing.assert_allclose(values, want, atol=1e-5)
    slope = jax.grad(lambda epsilon: perturbed(epsilon=epsilon).away.sum())(0.2)
    assert slope == 0


@pytest.mark.parametrize("function", [token_kl, perturbed_logprobs])
def test_models_of_other_tokens_or_another_vocabulary_are_refused(function):
    hidden, head, targets = problem()
    rest = {} if function is token_kl else {"targets": targets, "epsilon": 0.1}
    with pytest.raises(
        ValueError, match=r"reference_hidden \(1, 7, 8\) must be of the same tokens"
    ):
        function(hidden, head, hidden[:1], head, **rest)
    smaller = head._replace(weight=head.weight[1:], bias=head.bias[1:])
    with pytest.raises(ValueError, match="vocabularies of 23 and 22 tokens"):
        function(hidden, head, hidden, smaller, **rest)
    with pytest.raises(ValueError, match=r"reference_head.weight: \(23, 8\) must be .* is 4"):
        function(hidden, head, hidden[..., :4], head, **rest)


def test_perturbing_the_optimum_of_a_reward_gives_the_optimum_of_another_beta():
    """It is reference * exp(reward / beta) / Z; away from the reference is a smaller beta."""
    hidden, head, targets = problem(2)
    plain = head._replace(softcap=None, scale=None)
    reward = jax.random.normal(jax.random.key(5), plain.bias.shape)
    optimum = lambda beta: plain._replace(bias=plain.bias + reward / beta)
    got = perturbed_logprobs(hidden, optimum(0.5), hidden, plain, targets, epsilon=0.2)
    for values, beta in zip(got, (0.5 / 1.2, 0.5 / 0.8)):
        want = token_logprobs_plain(hidden, optimum(beta), targets)
        np.testing.assert_allclose(values, want, atol=1e-4)


def test_at_the_reference_both_perturbed_policies_are_the_policy_to_the_last_bit():
    hidden, head, targets = problem(2)
    away, towards = perturbed_logprobs(hidden, head, hidden, head, targets, epsilon=0.01)
    np.testing.assert_array_equal(away, towards)


@pytest.mark.parametrize("function", [token_logprobs, token_logprobs_and_entropy, token_statistics])
def test_shapes_that_do_not_belong_together_are_refused(function):
    hidden, head, targets = problem()
    with pytest.raises(ValueError, match=r"hidden: \(2, 7, 8\) must be the shape of targets"):
        function(hidden, head, targets[:1])
    with pytest.raises(ValueError, match=r"head.weight: \(8, 23\) must be \[vocabulary, width\]"):
        function(hidden, head._replace(weight=head.weight.T), targets)


def test_sums_by_response_leave_padding_out_even_when_it_is_nan():
    values = jnp.array([[1.0, 2.0, 4.0, jnp.nan]])
    response = jnp.array([[0, 2, 2, -1]])
    np.testing.assert_array_equal(sum_by_response(values, response, 4), [[1.0, 0.0, 6.0, 0.0]])


@pytest.mark.parametrize("shape", [(12, 6, 8), (7, 5, 3), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_weights_gradient_is_the_sum_of_outer_products(shape, dtype):
    rows, inward, outward = shape
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(rows, n)), dtype) for n in (inward, outward))
    gradient = jax.jit(weight_gradient)(x, g)
    assert gradient.dtype == jnp.float32
    exact = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
    np.testing.assert_allclose(gradient, exact, atol=1e-5)


def test_what_fills_up_the_vocabulary_says_nothing_where_all_logits_are_far_below_zero():
    keys = jax.random.split(jax.random.key(3), 4)
    hidden, weight = jax.random.normal(keys[0], (2, 9, 8)), jax.random.normal(keys[1], (300, 8))
    bias = jax.random.normal(keys[2], (300,)) - 200.0  # exp(200) is no float32
    targets = jax.random.randint(keys[3], (2, 9), 0, 300)
    total = lambda logprobs, **options: jax.jit(
        jax.grad(
            lambda *arrays: logprobs(arrays[0], Head(*arrays[1:]), targets, **options).sum(),
            (0, 1, 2),
        )
    )(hidden, weight, bias)
    got, want = total(token_logprobs, max_logits=18 * 100), total(token_logprobs_plain)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=1e-4)


@TWINS
@pytest.mark.parametrize("max_logits", [10**9, 14 * 128, 14 * 256], ids=["one", "three", "two"])
def test_parts_of_a_vocabulary_that_devices_share_equal_the_plain_twin(max_logits, by_parts, plain):
    mesh = sharding.make_mesh(data=2, tensor=4)
    hidden, head, targets = problem(4)
    keys = jax.random.split(jax.random.key(5))
    head = head._replace(
        weight=jax.random.normal(keys[0], (300, WIDTH)), bias=jax.random.normal(keys[1], (300,))
    )
    want = value_and_gradients(plain, hidden, head, targets)
    alone = token_logprobs_plain(hidden, head, targets)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    head = head._replace(weight=place(head.weight, "tensor"), bias=place(head.bias, "tensor"))
    hidden, targets = place(hidden, "data"), place(targets, "data")
    by_parts = partial(by_parts, max_logits=max_logits)

    @jax.jit
    def both(hidden, weight, bias, targets):
        arguments = hidden, head._replace(weight=weight, bias=bias), targets
        statistics = token_statistics(*arguments, max_logits=max_logits)
        return value_and_gradients(by_parts, *arguments), statistics.logprob

    with jax.set_mesh(mesh):
        got, logprob = both(hidden, head.weight, head.bias, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6, rtol=1e-5), got, want)
    np.testing.assert_allclose(logprob, alone, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(("fsdp", "tensor"), [(4, 1), (2, 2)])
def test_a_head_that_devices_share_is_gathered_once_and_not_for_each_of_its_parts(fsdp, tensor):
    mesh = sharding.make_mesh(1, fsdp, tensor, devices=jax.devices()[:4])
    rows = PartitionSpec(sharding.ROWS)

    def shape(spec, dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    weight = shape(PartitionSpec("tensor", "fsdp"), jnp.float32, 1024, 64)
    arguments = shape(rows, jnp.float32, 8, 16, 64), weight, shape(rows, jnp.int32, 8, 16)
    parts = 4  # of the vocabulary
    loss = lambda hidden, weight, targets: token_logprobs(
        hidden, Head(weight), targets, max_logits=8 * 16 * 1024 // parts
    ).sum()
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    communication = collectives(program.as_text())
    assert parts in {one.times for one in communication}  # the parts' gradients are reduced in turn
    gathered = [one for one in communication if one.kind == "all-gather"]
    assert 4 * 1024 * 64 // tensor in {one.size for one in gathered}
    assert {one.times for one in gathered} == {1}


def mesh_of(platform, **sizes) -> AbstractMesh:
    """Devices that need not be here."""
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    sizes = dict.fromkeys((sharding.SWEEP, *sharding.AXES), 1) | sizes
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), abstract_device=device)


@pytest.mark.parametrize(
    ("platform", "sizes", "in_parts"),
    [
        ("cpu", {}, True),
        ("cpu", {"sweep": 4}, True),
        ("cpu", {"data": 4}, False),
        ("tpu", {}, False),
        ("gpu", {}, False),
    ],
)
def test_parts_are_of_a_caches_size_where_a_model_runs_on_one_cpu(platform, sizes, in_parts):
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    arguments = shape(jnp.float32, 2048, 8), shape(jnp.float32, 3000, 8), shape(jnp.int32, 2048)
    with jax.sharding.use_abstract_mesh(mesh_of(platform, **sizes)):
        program = jax.make_jaxpr(lambda h, w, t: token_logprobs(h, Head(w), t))(*arguments)
    assert ("scan" in str(program)) == in_parts


@pytest.mark.parametrize(
    ("tensor", "max_logits", "held"),
    [
        (1, 10**6, 2 * 50 * 300),  # all logits, and their gradient
        (1, 50 * 110, 2 * 50 * 100),  # three equal parts of 300 words
        (2, 50 * 110, 2 * 50 * 128),  # every third word, in a multiple of 128
    ],
)
def test_logits_at_once_are_those_of_a_part_and_as_many_gradients(tensor, max_logits, held):
    mesh = mesh_of("gpu", tensor=tensor)
    assert logits_at_once(50, 300, max_logits=max_logits, mesh=mesh) == held


def test_a_model_without_a_vocabulary_holds_no_logits():
    assert logits_at_once(50, 0, max_logits=10**6, mesh=mesh_of("gpu")) == 0
