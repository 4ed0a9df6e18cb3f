"""From a loss's name to what the train step wants: sums and weights on rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dpojax import losses
from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics
from dpojax.losses import RunningMean, update_baseline
from dpojax.methods.preference.metrics import labelled_metrics, pair_metrics, token_kl_estimate
from dpojax.methods.preference.options import SORTED, LossRequirements, arguments, loss_requirements
from dpojax.methods.preference.views import LabelledView, PairView, RankedView, View
from dpojax.training.metrics import Metric
from dpojax.training.objective import Hyper, Objective, Terms

_VIEWS = {"pairs": PairView, "ranked": RankedView, "labelled": LabelledView}
_BY_DATA = {"scores", "offset", "probability", "tie", "ranks", "desirable"}


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
    wants, names = loss_requirements(loss), loss.split("+")

    def terms(tokens: TokenStatistics, rows: Rows, hyper: Hyper) -> Terms:
        view = _VIEWS[wants.form](tokens, rows, hyper, options)
        value, counted = _values(names, view), _counted(names, view)
        if wants.chosen:
            value = value[..., :1]
        if wants.form == "pairs" and view.weight is not None:
            value = value * view.weight
        value = jnp.where(counted, value, 0.0)
        metrics = _metrics(view, hyper.get("beta", jnp.float32(1.0))) | _level(names, view)
        if wants.form == "pairs":
            value, counted = value.sum(-1), counted.sum(-1)
        return Terms(value, counted.astype(jnp.float32), metrics)

    return Objective(
        terms,
        needs_reference=wants.reference,
        at_reference=_at_reference(names, wants, options),
        statistics=("log_collision",) * (options.get("wpo") == "corrected") + ("kl",) * wants.live,
        coupled=bool({*names} & {*SORTED, "kto"}) or options.get("baseline") == "running",
        baseline=_running_mean(wants, options) if options.get("baseline") == "running" else None,
    )


def _values(names: list[str], view: View) -> Array:
    """The loss, or the weighted sum of losses, of everything in the view."""
    values = [_value(name, view) for name in names]
    return values[0] if len(names) == 1 else losses.mixture(values, list(view.hyper["weights"]))


def _value(name: str, view: View) -> Array:
    if name == "sft":
        return losses.sft(-view.nll)
    function = getattr(losses, name)
    given = {x: _argument(x, view) for x in arguments(name)}
    if name not in SORTED:
        return function(**given)
    flat = jax.tree.map(lambda x: x.ravel() if x.ndim else x, given)
    return function(**flat).reshape(view.mask.shape)


def _argument(name: str, view: View) -> Any:
    """What the rows answer, else a traced option, else one that is not."""
    if hasattr(type(view), name):
        return getattr(view, name)
    return view.hyper[name] if name in view.hyper else view.settings[name]


def _counted(names: list[str], view: View) -> Array:
    """What has a loss: pairs with a preference (or a tie, if told), best responses, rankings,
    responses."""
    if isinstance(view, RankedView):
        return view.rows.present.sum(-1) > 1
    if names == ["sft"]:
        return view.rows.present[..., :1]
    return view.present if "dpo_ties" in names else view.mask


def _metrics(view: View, beta: Array) -> dict:
    if isinstance(view, LabelledView):
        metrics = labelled_metrics(view, beta)
    else:
        preferred = view.present & (view.tie == 0)
        metrics = pair_metrics(view.plain_policy, view.plain_reference, preferred, beta)
    if view.rows.reference is None:
        del metrics["displacement"]
    else:
        metrics["kl/per_token"] = token_kl_estimate(view.tokens.logprob, view.rows)
    return metrics


def _level(names: list[str], view: View) -> dict:
    """What rewards are held against: KTO's z under TRL's name, BCO's shift."""
    one = jnp.ones(())
    found = {"kl": Metric(view.kl, one)} if names == ["kto"] else {}
    return found | ({"delta": Metric(view.delta, one)} if "delta" in view.hyper else {})


def _running_mean(wants: LossRequirements, options: Mapping[str, Any]) -> Callable:
    """BCO's baseline: the running mean of all implicit rewards, this batch's included."""
    view_of = _VIEWS[wants.form]

    def take(baseline: RunningMean, tokens, rows: Rows, hyper: Hyper) -> RunningMean:
        view = view_of(tokens, rows, hyper, options)
        reward = lambda policy, reference: hyper["beta"] * (policy - reference)
        rewards = jax.tree.map(reward, view.policy, view.reference)
        return update_baseline(baseline, rewards, view.mask)

    return take


def _at_reference(names: list[str], wants: LossRequirements, options) -> Callable | None:
    """The closed-form loss of a pair at policy == reference; None where data or policy enter."""
    alone = all("reference" in arguments(name) for name in names)
    if not alone or "wpo" in options or wants.inputs & _BY_DATA:
        return None

    def value(hyper: Hyper) -> Array:
        return _values(names, _pair_at_reference(hyper, options)).sum()

    return value


def _pair_at_reference(hyper: Hyper, settings: Mapping[str, Any]) -> PairView:
    """One pair of one-token responses to which policy and reference give log-prob 0."""
    rows = Rows(
        *(jnp.zeros((1, 2), jnp.int32),) * 6,
        response=jnp.array([[0, 1]]),
        present=jnp.ones((1, 1, 2), bool),
        example=jnp.zeros((1, 1), jnp.int32),
        rank=jnp.array([[[0, 1]]]),
        scores=jnp.zeros((1, 1, 2)),
        desirable=jnp.ones((1, 1), bool),
        reference=jnp.zeros((1, 2)),
    )
    tokens = TokenStatistics(jnp.zeros((1, 2)), kl=jnp.zeros((1, 2)))
    return PairView(tokens, rows, hyper, settings)
