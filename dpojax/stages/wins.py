"""How often a judge prefers a policy's samples to the reference's, at the evaluations of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax

from dpojax import display, sharding, storage
from dpojax.config.errors import config_errors
from dpojax.evaluation import policies
from dpojax.evaluation.judging.asking import judge_comparisons
from dpojax.evaluation.judging.bootstrap import index_prompts, prompt_means
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.judge import Judge, JudgeError
from dpojax.evaluation.judging.open_judge import open_judge
from dpojax.evaluation.judging.statistics import WinRate, win_rate
from dpojax.evaluation.judging.verdicts import Comparison, Judgement, Outcome
from dpojax.evaluation.policies import PolicyEvaluation
from dpojax.sampling import build_sampler, generate
from dpojax.stages.setup import Setup
from dpojax.watchdog import unwatched

VERDICTS = "verdicts"  # folder of the workdir
RATE = "samples/win_rate"
LOW, HIGH = f"{RATE}_low", f"{RATE}_high"
OFTEN_NAN = (RATE, LOW, HIGH)  # logged at every evaluation, nan where they are not known
# All that a judge adds to an evaluation; the last two only if it is asked in both orders.
METRICS = (*OFTEN_NAN, "samples/ties", "samples/unparsed")
METRICS += ("samples/flip_rate", "samples/position_bias")

AddWins = Callable[[PolicyEvaluation], PolicyEvaluation]


def open_wins(setup: Setup, reference_params: dict, prompts: Sequence[str], seed: int) -> AddWins:
    """What adds the win rate against the reference to an evaluation of samples.

    The reference's responses are drawn once, with another seed than the policy's: the reference
    itself wins half of the time.

    Args:
      reference_params: weights of the reference.
      prompts: of `config.samples`.
      seed: of the draws.

    Raises:
      ConfigError: the judge cannot be opened.
    """
    spec = setup.config.samples.judge
    if not spec:
        return _unchanged
    with config_errors("samples.judge"):
        judge = open_judge(spec, template=setup.config.samples.judge_template)
    responses = _reference_responses(setup, reference_params, prompts, seed)
    folder = setup.workdir / VERDICTS

    def add(evaluation: PolicyEvaluation) -> PolicyEvaluation:
        comparisons = [
            Comparison(prompt, prompt, one, other)
            for prompt, of_policy, of_reference in zip(prompts, evaluation.responses, responses)
            for one, other in zip(of_policy, of_reference)
        ]
        try:
            judgements = _ask(judge, comparisons, folder)
        except JudgeError as error:
            if jax.process_index() == 0:
                display.say(f"WARNING: no win rate at this evaluation: {error}")
            return evaluation._replace(judged=dict.fromkeys(OFTEN_NAN, math.nan))
        ids = [comparison.id for comparison in comparisons]
        rate = win_rate(judgements, ids, is_symmetric=judge.is_symmetric)
        means = prompt_means([judgement.score for judgement in judgements], index_prompts(ids))
        score_of = dict(zip(dict.fromkeys(ids), means.tolist()))  # some prompts may be the same
        return evaluation._replace(
            judged=_metrics(rate), win_scores=[score_of[prompt] for prompt in prompts]
        )

    return add


def _unchanged(evaluation: PolicyEvaluation) -> PolicyEvaluation:
    return evaluation


def _reference_responses(
    setup: Setup, reference_params: dict, prompts: Sequence[str], seed: int
) -> list[list[str]]:
    """Samples of the reference, [prompts][config.samples.per_prompt]."""
    config = setup.config.samples
    sampler = build_sampler(
        setup.model, max_new_tokens=config.max_new_tokens, stop=setup.stop_tokens
    )
    ids = policies.encode_prompts(setup.tokenizer, prompts)
    with jax.set_mesh(setup.mesh):
        drawn = generate(
            sampler,
            reference_params,
            ids,
            batch_size=policies.BATCH_SIZE,
            seed=seed,
            temperature=config.temperature,
            samples=config.per_prompt,
        )
    return [policies.response_texts(setup.tokenizer, *pair) for pair in zip(ids, drawn)]


def _ask(judge: Judge, comparisons: Sequence[Comparison], folder: storage.Path) -> list[Judgement]:
    """What the judge says. Only the first process asks a judge that may cost something.

    Replies of such a judge are kept in the workdir: a run that is resumed does not ask again.
    """
    if judge.is_symmetric:  # it scores here
        return judge_comparisons(judge, comparisons, repeat=0).judgements

    error = None
    if jax.process_index() == 0:
        try:
            with VerdictCache(folder) as cache:
                judge_comparisons(judge, comparisons, cache=cache, repeat=0)
        except JudgeError as raised:
            error = raised
    with unwatched():  # the first process is watched while it asks
        has_failed = sharding.agreed(error is not None)
    if has_failed:
        raise error or JudgeError("the first process could not ask the judge")
    with VerdictCache(folder) as cache:
        return judge_comparisons(judge, comparisons, cache=cache, repeat=0).judgements


def _metrics(rate: WinRate) -> dict[str, float]:
    """Under their names in metrics.jsonl; what is not known is nan or left out."""
    values = (
        rate.value,
        rate.low,
        rate.high,
        rate.share(Outcome.TIE),
        rate.share(Outcome.UNPARSED),
        rate.flip_rate.value,
        rate.position_bias.value,
    )
    named = dict(zip(METRICS, values, strict=True))
    return {name: x for name, x in named.items() if name in OFTEN_NAN or not math.isnan(x)}
