"""From a loss's name to what the train step needs: sums and weights on rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dpojax import losses
from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics
from dpojax.losses import RunningMean
from dpojax.methods.preference.arguments import FORMS, read_argument
from dpojax.methods.preference.metrics import labelled_metrics, pair_metrics
from dpojax.methods.preference.options import (
    LOSS_TABLE,
    arguments,
    from_batch,
    loss_requirements,
    running_mean,
)
from dpojax.methods.preference.rewards import Reward, reward_of
from dpojax.methods.preference.views import LabelledView, PairView, RankedView, View
from dpojax.training.metrics import Metric
from dpojax.training.objective import Hyper, Objective, Terms


def objective(loss: str, options: Mapping[str, Any]) -> Objective:
    """The mean of a loss over all pairs, rankings or labelled responses of the optimiser batch.

    A prompt with K > 2 ranked responses gives a pair loss all its K (K - 1) / 2 pairs without the
    ties among them. Of a mixture's losses each pair gets the weighted sum. `sft` alone is the mean
    over prompts, and learns from the best response, so rows may lack the others.

    Args:
      loss: a name of `options.LOSSES`, or several joined by +.
      options: as `options.resolve` returns them. Only those that are not numbers are read here;
        the numbers come in `hyper` when the objective is called.
    """
    requirements, names = loss_requirements(loss), loss.split("+")
    view_of, reward = FORMS[requirements.form].view, loss_reward(loss, options)

    def terms(tokens: TokenStatistics, rows: Rows, hyper: Hyper) -> Terms:
        view = view_of(tokens, rows, hyper, options)
        value, counted = _values(names, view), _has_loss(names, view)
        if requirements.chosen:
            value = value[..., :1]  # the same for all pairs of an example
        weight = view.weight() if isinstance(view, PairView) else None
        if weight is not None:
            value = value * weight
        value = jnp.where(counted, value, 0.0)
        of_view = labelled_metrics if isinstance(view, LabelledView) else pair_metrics
        metrics = of_view(view, reward)
        metrics |= _reward_baselines(names, view)
        if isinstance(view, PairView):  # [..., R, E, P] -> [..., R, E]
            value, counted = value.sum(-1), counted.sum(-1)
        return Terms(value * rows.weight, counted * rows.weight, metrics)

    statistics = []
    if options.get("wpo") == "corrected":
        statistics.append("log_collision")
    if "kl" in requirements.inputs and requirements.live:
        statistics.append("kl")
    if "steps" in requirements.inputs:
        statistics.append("perturbed")
    running = running_mean(names, options)
    return Objective(
        terms,
        needs_reference=requirements.reference,
        at_reference=_at_reference(names, options),
        statistics=tuple(statistics),
        sync_every=options.get("sync_every", 0),
        coupled=running is not None or any(LOSS_TABLE[name].coupled for name in names),
        baseline=None if running is None else _running_mean(running, view_of, options),
    )


def loss_reward(loss: str, options: Mapping[str, Any]) -> Reward:
    """The reward that a loss, or a mixture joined by +, trains; arguments as in `objective`."""
    names = loss.split("+")
    return reward_of(names, [LOSS_TABLE[name].function for name in names], options)


def _values(names: Sequence[str], view: View) -> Array:
    """The loss, or the weighted sum of losses, of everything in the view."""
    values = [_value(name, view) for name in names]
    return values[0] if len(names) == 1 else losses.mixture(values, list(view.hyper["weights"]))


def _value(name: str, view: View) -> Array:
    """One loss with its arguments from the batch and the options."""
    loss = LOSS_TABLE[name]
    values = {x: read_argument(name, loss.form, x, view) for x in arguments(name)}
    if not loss.sorts_batch:
        return loss.function(**values)
    flat = jax.tree.map(lambda x: x.ravel() if x.ndim else x, values)
    return loss.function(**flat).reshape(view.mask().shape)


def _has_loss(names: Sequence[str], view: View) -> Array:
    """What has a loss, bool: pairs, best responses, rankings or labelled responses."""
    if isinstance(view, RankedView):
        return view.mask().sum(-1) > 1
    if list(names) == ["sft"]:
        return view.rows.present[..., :1]
    if any(LOSS_TABLE[name].counts_ties for name in names):
        return view.present()
    return view.mask()


def _reward_baselines(names: Sequence[str], view: View) -> dict[str, Metric]:
    """What rewards are compared with: KTO's z, nats, and the running mean of BCO or beta-DPO."""
    one, baselines = jnp.ones(()), {}
    if list(names) == ["kto"]:
        baselines["kto/baseline"] = Metric(view.kl(), one)
    if "delta" in view.hyper:
        baselines["delta"] = Metric(view.delta(), one)
    return baselines


def _running_mean(running: Callable, view_of: type[View], options: Mapping[str, Any]) -> Callable:
    """What a loss keeps over the batches, as the step calls it."""

    def update(baseline: RunningMean, tokens, rows: Rows, hyper: Hyper) -> RunningMean:
        return running(baseline, view_of(tokens, rows, hyper, options))

    return update


def _at_reference(names: Sequence[str], options: Mapping[str, Any]) -> Callable | None:
    """The closed-form loss of a pair at policy == reference; None where data or policy enter."""
    inputs = [from_batch(name) for name in names]
    needs_data = any(source.needs_data for sources in inputs for source in sources.values())
    if needs_data or "wpo" in options or not all("reference" in sources for sources in inputs):
        return None

    def value(hyper: Hyper) -> Array:
        return _values(names, _pair_at_reference(hyper, options)).sum()

    return value


def _pair_at_reference(hyper: Hyper, settings: Mapping[str, Any]) -> PairView:
    """One pair of one-token responses to which policy and reference give log-prob 0."""
    zeros = jnp.zeros((1, 2), jnp.int32)
    rows = Rows(
        tokens=zeros,
        positions=zeros,
        segment=zeros,
        branch=zeros,
        source=zeros,
        target=zeros,
        response=jnp.array([[0, 1]]),
        present=jnp.ones((1, 1, 2), bool),
        example=jnp.zeros((1, 1), jnp.int32),
        rank=jnp.array([[[0, 1]]]),
        scores=jnp.zeros((1, 1, 2)),
        desirable=jnp.ones((1, 1), bool),
        weight=jnp.ones((1, 1)),
        reference=jnp.zeros((1, 2)),
    )
    tokens = TokenStatistics(jnp.zeros((1, 2)), kl=jnp.zeros((1, 2)))
    return PairView(tokens, rows, hyper, settings)
