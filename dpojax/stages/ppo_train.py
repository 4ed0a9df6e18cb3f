"""The iterations of PPO: draw responses, score them, update policy and value model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dpojax import display, sharding
from dpojax.evaluation.policies import PolicyEvaluation, response_texts
from dpojax.methods import ppo
from dpojax.methods.ppo import PPOState
from dpojax.sampling import Prompts, Sample, Samples
from dpojax.stages import kept_weights
from dpojax.stages.kept import has_ended, new_keep_best, new_stop_at
from dpojax.stages.kept_weights import FINGERPRINT
from dpojax.stages.ppo_setup import PPOSetup
from dpojax.stages.samples import append_samples, open_judged_samples
from dpojax.stages.stage import announce_kept, open_metrics
from dpojax.training import checkpoints, goodput
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.keep_best import KEEP_BEST
from dpojax.training.loop import WINDOW, Every, NonFiniteLoss, print_line, say_reached
from dpojax.training.metrics import MetricWriter, Window
from dpojax.training.preemption import Preempted, StopSignal
from dpojax.training.reference import fingerprint
from dpojax.training.state import schedule_of, warmup_steps
from dpojax.training.step import Report
from dpojax.training.stop_at import STOP_AT


def train(stage: PPOSetup, start: Callable[[], dict], stop: StopSignal) -> dict:
    """The policy's final parameters, float32; see `Stage.train`.

    The parameters that the stage starts from become the reference.

    Raises:
      NonFiniteLoss: the last good checkpoint is untouched.
      Preempted: asked to stop, once the state is saved.
      RewardError: see `rewards.Reward`. CheckpointError.
    """
    config = stage.setup.config
    with Checkpoints(stage.checkpoint_folder, max_checkpoints=config.max_checkpoints) as saved:
        done = saved.latest
        if has_ended(saved, stage.steps):
            return stage.trained_params()
        if done is None:
            params = start()
            metadata = {FINGERPRINT: fingerprint(params)}
            checkpoints.save_tree(stage.reference_folder, params, metadata)
            state = stage.new_state(params)
        else:
            kept_weights.mend(stage.kept_weights(start))
            state, _ = saved.restore(stage.abstract_state())
        with open_metrics(stage, done) as writer:
            reference = stage.reference_params()
            goodput.goes_on(stage.name, done or 0)
            if done:
                print_line(stage.name, f"resumes at iteration {done} of {stage.steps}")
            with stop.steps(), goodput.spending(goodput.STEP):
                finished = _iterate(stage, state, reference, saved, writer, stop)
        if stage.config.keep_best:
            announce_kept(stage)
            return stage.trained_params()
        return finished.policy.params


def _iterate(
    stage: PPOSetup,
    state: PPOState,
    reference: dict,
    saved: Checkpoints,
    writer: MetricWriter,
    stop: StopSignal,
) -> PPOState:
    """The iterations from the state's on to the last, or until `keep_best` or `stop_at` stops."""
    config, steps = stage.setup.config, stage.steps
    every = Every(config.log_every, config.evaluate_every, config.checkpoint_every)
    window, clocks, done = Window(), [], int(state.iteration)
    reward = stage.evaluation_reward
    sample = open_judged_samples(stage.setup, reference, stage.programs.score, reward_name=reward)
    keep, stop_at, ended = new_keep_best(stage.config), new_stop_at(stage.config), False
    followed = {key: x for key, x in ((KEEP_BEST, keep), (STOP_AT, stop_at)) if x is not None}
    if done:
        window.restore(saved.metadata(done).get(WINDOW, {}))
        for metric in followed.values():
            metric.restore(saved.metadata(done))

    def evaluate() -> bool:
        """Log an evaluation; return whether it is the best so far."""
        with goodput.spending(goodput.EVALUATION):
            values = _log_evaluation(stage, sample(state.policy.params), done, writer)
        if stop_at is not None and stop_at.add(done, values):
            say_reached(stage.name, stop_at, steps)
        return keep is not None and keep.add(done, values)

    if done == 0:
        evaluate()
    with display.bar(stage.name, steps, done, "iterations") as bar:
        while done < steps and not ended:
            state, report, seconds = _iteration(stage, state, reference, done)
            done += 1
            _require_finite(stage, report, done, saved)
            window.add(report.metrics)
            clocks.append(seconds)
            bar.update()
            log, evaluating, save = every.due(done, steps)
            stopping = stop.agreed(done)
            is_best = evaluating and evaluate()
            ended = any(metric.stopped_at == done for metric in followed.values())
            if log or ended:
                values = window.flush() | _pace(clocks) | goodput.metrics()
                writer.write(done, values)
                bar.note = (
                    f"reward {values['objective/scores']:.3f}, kl {values['objective/kl']:.2f}"
                )
            if save or stopping or is_best or ended:
                metadata = {key: metric.state() for key, metric in followed.items()}
                metadata |= {"stage": stage.name, WINDOW: window.state()}
                writer.sync()
                _save(stage, saved, done, state, metadata, keep.score if is_best else None)
            if stopping and done < steps and not ended:
                saved.wait()
                raise Preempted(f"{stage.name}: stopped at iteration {done} of {steps}, saved")
    saved.wait()
    return state


def _save(
    stage: PPOSetup,
    saved: Checkpoints,
    done: int,
    state: PPOState,
    metadata: dict,
    score: float | None,
) -> None:
    """Save the state after `done` iterations; `score` is that of the best ones."""
    with goodput.spending(goodput.CHECKPOINT):
        saved.save(done, state, metadata=metadata, score=score)
    goodput.saved(stage.name, done)


def _log_evaluation(
    stage: PPOSetup, evaluation: PolicyEvaluation, done: int, writer: MetricWriter
) -> dict[str, float]:
    """Write and print an evaluation after `done` iterations; return its metrics."""
    append_samples(stage.folder, done, evaluation)
    values = evaluation.metrics()
    writer.write(done, values, split="eval")
    print_line(stage.name, _evaluation_line(done, stage.steps, values))
    return values


def _require_finite(stage: PPOSetup, report: Report, done: int, saved: Checkpoints) -> None:
    if not bool(report.finite):
        raise NonFiniteLoss(
            f"{stage.name}: loss or gradient is not finite in iteration {done}. The last good "
            f"checkpoint ({saved.latest}) is kept; lower config.ppo.learning_rate or "
            "config.ppo.value_learning_rate in a new workdir"
        )


def _iteration(
    stage: PPOSetup, state: PPOState, reference: dict, iteration: int
) -> tuple[PPOState, Report, np.ndarray]:
    """The state after one more iteration, its report, and the seconds of its three parts [3]."""
    config, clock = stage.config, [time.perf_counter()]
    texts, prompts = stage.batch(iteration)
    drawn = ppo.draw(stage.programs.sampler, state, prompts, samples=config.samples)
    samples = sharding.to_host(drawn)
    clock.append(time.perf_counter())
    scores = _scores(stage, texts, prompts, samples)
    clock.append(time.perf_counter())
    schedule = schedule_of(config, warmup_steps(config, stage.steps), stage.steps)
    hyper = stage.hyper
    hyper |= {"learning_rate": hyper["learning_rate"] * schedule(iteration)}
    responses = ppo.pack(prompts, samples, multiple=stage.row_multiple)
    state, report = stage.programs.update(state, reference, responses, scores.ravel(), hyper)
    jax.block_until_ready(report.finite)
    clock.append(time.perf_counter())
    return state, report, np.diff(clock)


def _scores(
    stage: PPOSetup, texts: Sequence[str], prompts: Prompts, samples: Samples
) -> np.ndarray:
    """The rewards of samples on the host, float32 [B, N]."""
    asked_prompts, responses = [], []
    for row, (text, length) in enumerate(zip(texts, prompts.lengths)):
        drawn = [_sample_at(samples, row, n) for n in range(samples.lengths.shape[1])]
        responses += response_texts(stage.setup.tokenizer, prompts.tokens[row, :length], drawn)
        asked_prompts += [text] * len(drawn)
    return np.float32(stage.reward(asked_prompts, responses)).reshape(samples.lengths.shape)


def _sample_at(samples: Samples, row: int, n: int) -> Sample:
    end = samples.lengths[row, n]
    return Sample(*(x[row, n, :end] for x in samples[:3]), bool(samples.stopped[row, n]))


def _pace(clocks: list[np.ndarray]) -> dict[str, float]:
    """Median seconds of an iteration's parts since the last call; the first iteration compiles."""
    draw, reward, update = np.median(clocks, axis=0)
    clocks.clear()
    return {
        "perf/seconds_draw": draw,
        "perf/seconds_reward": reward,
        "perf/seconds_update": update,
        "perf/seconds_per_iteration": draw + reward + update,
    }


def _evaluation_line(step: int, total: int, values: dict[str, float]) -> str:
    kl = round(values["samples/kl"], 2) + 0.0  # no -0.00
    return (
        f"step {step:>{len(str(total))}}/{total}  reward {values['samples/reward']:.3f}  "
        f"kl {kl:.2f} nats  length {values['samples/length']:.1f}  "
        f"stopped {100 * values['samples/stopped']:.0f} %"
    )
