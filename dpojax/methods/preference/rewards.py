"""The reward that a loss trains. Metrics, summaries and figures all read it from here.

A loss compares a quantity of the chosen response with that of the rejected one. This quantity is
its reward. For DPO it is beta times the log-ratio to the reference. A loss without a reference, or
one that divides by the length, has another one: accuracy and margin are of that.

What a loss adds to the difference of two rewards (a target margin, an offset, a penalty) is no part
of the reward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dpojax import losses
from dpojax.losses.reference_free import curved_reward, log_odds
from dpojax.methods.preference.views import View
from dpojax.training.objective import Hyper


class Response(NamedTuple):
    """What a reward sees of responses; arrays of one shape.

    Attributes:
      logprob: the policy's log-prob of a response, nats.
      reference: the reference's; 0 where a divergence's score stands in `logprob`.
      length: tokens, float, at least 1.
    """

    logprob: Array
    reference: Array
    length: Array


class Reward(NamedTuple):
    """The reward of one response.

    Attributes:
      value: (responses, hyper) -> rewards, in the shape of `logprob`.
      formula: in ASCII. log p is the policy's log-prob of the response, log q the reference's.
      unit: of the reward, and so of its margin.
      needs_reference: where policy == reference, all responses have one reward (0 but for chi^2).
    """

    value: Callable[[Response, Hyper], Array]
    formula: str
    unit: str = "nats"
    needs_reference: bool = False

    def of(self, view: View) -> Any:
        """The rewards of a batch: a `Pair` [..., R, E, P], or of labelled responses [..., R, E]."""

        def value(logprob: Array, reference: Array, length: Array) -> Array:
            return self.value(Response(logprob, reference, jnp.maximum(length, 1)), view.hyper)

        return jax.tree.map(value, *view.reward_inputs())


def _log_ratio(x: Response, hyper: Hyper) -> Array:
    return hyper["beta"] * (x.logprob - x.reference)


def _log_ratio_per_token(x: Response, hyper: Hyper) -> Array:
    return _log_ratio(x, hyper) / x.length


def _logprob(x: Response, hyper: Hyper) -> Array:
    return hyper["beta"] * x.logprob


def _logprob_per_token(x: Response, hyper: Hyper) -> Array:
    return hyper["beta"] * x.logprob / x.length


def _plain_logprob(x: Response, hyper: Hyper) -> Array:
    del hyper
    return x.logprob


def _plain_logprob_per_token(x: Response, hyper: Hyper) -> Array:
    del hyper
    return x.logprob / x.length


def _curved(x: Response, hyper: Hyper) -> Array:
    return curved_reward(x.logprob / x.length, beta=hyper["beta"], alpha=hyper["alpha"])


def _log_odds(x: Response, hyper: Hyper) -> Array:
    del hyper
    return log_odds(x.logprob / x.length)


def _likelihood(x: Response, hyper: Hyper) -> Array:
    del hyper
    return jnp.exp(x.logprob / x.length)


def _chi_squared(x: Response, hyper: Hyper) -> Array:
    one = losses.Pair(x.logprob, x.logprob), losses.Pair(x.reference, x.reference)
    return hyper["beta"] * losses.divergence_scores(*one, "chi_squared").chosen


LOG_RATIO = Reward(_log_ratio, "beta (log p - log q)", needs_reference=True)
LOG_RATIO_PER_TOKEN = Reward(
    _log_ratio_per_token, "beta (log p - log q) / length", "nats per token", needs_reference=True
)
LOGPROB = Reward(_logprob, "beta log p")
LOGPROB_PER_TOKEN = Reward(_logprob_per_token, "beta log p / length", "nats per token")
PLAIN_LOGPROB = Reward(_plain_logprob, "log p")
PLAIN_LOGPROB_PER_TOKEN = Reward(_plain_logprob_per_token, "log p / length", "nats per token")

# Losses whose reward their arguments do not tell; see `reward_of`.
REWARDS: dict[str, Reward] = {
    "alphapo": Reward(_curved, "beta (1 - exp(-alpha log p / length)) / alpha", "no unit"),
    "orpo": Reward(_log_odds, "log odds of exp(log p / length)"),
    "simper": Reward(_likelihood, "exp(log p / length)", "no unit"),
    "chipo": Reward(_chi_squared, "beta (p / q + log p - log q)", "no unit", needs_reference=True),
    # The reference enters the target margin alone.
    "alpha_dpo": LOGPROB_PER_TOKEN,
}
DIVERGENCE = Reward(_log_ratio, "beta f'(p / q)", "no unit", needs_reference=True)


def reward_of(
    names: Sequence[str], functions: Sequence[Callable], options: Mapping[str, Any]
) -> Reward:
    """The reward of a loss or a mixture, whose first loss but `sft` counts.

    Where `REWARDS` does not name it, the loss's arguments tell it: the log-ratio to the reference
    if it takes one, else the log-prob; per token if it takes lengths; times beta if it has one.

    Args:
      names: of the losses.
      functions: the losses themselves.
      options: as `options.resolve` returns them.
    """
    by_name = dict(zip(names, functions, strict=True))
    name = next((name for name in names if name != "sft"), "sft")
    if name in REWARDS:
        return REWARDS[name]
    if "divergence" in options and options["divergence"] != "reverse_kl":
        return DIVERGENCE
    takes = inspect.signature(by_name[name]).parameters
    per_token = "lengths" in takes and options.get("length_norm") != "sum"
    if name == "sft":
        per_token = options["nll_norm"] == "mean"
    if "reference" in takes:
        return LOG_RATIO_PER_TOKEN if per_token else LOG_RATIO
    if "beta" in takes:
        return LOGPROB_PER_TOKEN if per_token else LOGPROB
    return PLAIN_LOGPROB_PER_TOKEN if per_token else PLAIN_LOGPROB
