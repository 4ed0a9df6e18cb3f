"""Small batches with random log-probs, and what a plain loop makes of them."""

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data.examples import Example
from dpojax.data.packing import plan
from dpojax.data.rows import collate
from dpojax.logprobs import PerturbedLogprobs, TokenStatistics

# What each loss is given in tests, where it has no default of its own.
GIVEN = {
    "ipo": {"length_norm": "sum"},
    "dpo_ties": {"threshold": 1.0},
    "dpo_soft": {"scale": 1.0},
    "alphapo": {"gamma": 0.5, "alpha": 0.25},
    "gpo": {"convex": "exponential"},
    "chipo": {"max_reward": 1.0},
    "tpo_l": {"beta": 2.0, "gamma": 0.5, "alpha": 1.0},
    "beta_dpo": {"alpha": 0.6},
    "alpha_dpo": {"beta": 2.0, "gamma": 0.5, "alpha": 0.1},
    "npo": {"retain_weight": 1.0},
    "simnpo": {"beta": 2.5, "gamma": 0.0, "retain_weight": 1.0},
    "odpo": {"alpha": 0.5},
    "dpop": {"penalty": 1.0},
    "rpo": {"scale": 1.0, "form": "bwd_kl"},
    "uni_dpo": {"scale": 1.0, "good_score": 0.0},
    "unlikelihood": {"alpha": 0.1},
    "dpo+bco+sft": {"weights": (0.8, 0.2, 1.0)},
}


def example(*lengths, **fields):
    """A prompt of two tokens and responses of these lengths."""
    ids = lambda n: np.arange(1, n + 1, dtype=np.int32)
    cut = (False,) * len(lengths)
    return Example(
        "file:1", ids(2), tuple(map(ids, lengths)), cut, fields.pop("label", None), **fields
    )


def micro_batch(examples):
    indices = range(len(examples))
    rows = collate(examples, indices, plan(examples, [indices], length=64))
    return jax.tree.map(lambda x: x[0], rows)


def with_reference(rows, seed=0):
    """Random statistics of the policy's tokens, and `rows` with random reference log-probs."""
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.normal(-2, 1, rows.target.shape), jnp.float32)
    policy = TokenStatistics(draw(), log_collision=draw(), kl=jnp.abs(draw()))
    rows = rows._replace(reference=draw())
    return policy._replace(perturbed=PerturbedLogprobs(draw(), draw())), rows


def by_response(values, rows):
    """{(example, index of the response): [its tokens' values]} by a plain loop."""
    found = {}
    for place in zip(*np.nonzero(rows.response >= 0)):
        slot, index = divmod(int(rows.response[place]), rows.present.shape[-1])
        found.setdefault((int(rows.example[place[0], slot]), index), []).append(
            float(values[place])
        )
    return found
