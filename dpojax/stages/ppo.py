"""PPO as a stage of a run: its prompts, its iterations, and what came of them."""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from dpojax import sharding
from dpojax.config.checks import ConfigError, naming
from dpojax.data.pipeline import order
from dpojax.data.prompts import read_prompts
from dpojax.data.rows import empty
from dpojax.evaluation.policies import encode_prompts, response_texts
from dpojax.evaluation.rewards import Reward, open_reward
from dpojax.methods import ppo
from dpojax.methods.ppo import PPO, PPOState
from dpojax.models.decoder import SHARDING_RULES
from dpojax.rl import AdaptiveKL
from dpojax.runs.policy import stop_tokens
from dpojax.sampling import Prompts, Sample, Sampler, build_sampler
from dpojax.stages import setup as run_setup
from dpojax.stages.samples import SEED, append, last_samples, open_samples
from dpojax.stages.setup import Setup
from dpojax.training import checkpoints
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.forward import build_score
from dpojax.training.loop import Every, NonFiniteLoss, Preempted, StopSignal
from dpojax.training.metrics import MetricWriter, Window, progress, read_metrics
from dpojax.training.objective import Hyper
from dpojax.training.reference import fingerprint
from dpojax.training.state import abstract_state, make_optimizer, make_schedule
from dpojax.training.step import Report

NAME = "ppo"
SHOWN = 4  # responses in the summary


class PPOStage(NamedTuple):
    """The stage before it is trained: everything but weights."""

    setup: Setup
    texts: list[str]  # prompts to train on
    prompts: list[np.ndarray]  # their token ids
    reward: Reward
    settings: PPO
    optimizer: optax.GradientTransformation
    hyper: Hyper
    sampler: Sampler
    update: Callable  # jitted `ppo.build_update`; donates the state
    score: Callable  # jitted `training.forward.build_score`

    @property
    def name(self) -> str:
        return NAME

    @property
    def config(self):
        return self.setup.config[NAME]

    @property
    def folder(self) -> pathlib.Path:
        return self.setup.workdir / NAME

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def rows_of_update(self) -> int:
        """What the rows of an update are a multiple of."""
        parts = self.settings.minibatches * self.settings.micro_batches
        return parts * sharding.row_shards(self.setup.mesh)

    def batch(self, iteration: int) -> tuple[list[str], Prompts]:
        """The prompts of an iteration: as texts, and in arrays of the one width of all batches."""
        size, seed = self.config.batch_size, self.setup.config.seed
        chosen = order(len(self.texts), batch_size=size, steps=self.steps, seed=seed)[iteration]
        tokens = np.zeros((size, max(map(len, self.prompts))), np.int32)
        lengths = np.zeros(size, np.int32)
        for row, index in enumerate(chosen):
            ids = self.prompts[index]
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        # By row, so that a prompt that is in a batch twice is answered twice.
        prompts = Prompts(tokens, lengths, np.arange(size, dtype=np.int32))
        return [self.texts[index] for index in chosen], prompts


def prepare(setup: Setup) -> PPOStage:
    """Open the reward, read the prompts, and build the `programs` (compiled at first use).

    Raises:
      ConfigError: a reward that cannot be opened; fewer prompts than a batch; a prompt that leaves
        no room for its response.
      DataError: see `read_prompts`.
    """
    with naming("ppo.reward"):
        reward = open_reward(setup.config[NAME].reward, mesh=setup.mesh)
    texts, prompts = _prompts(setup)
    return programs(setup)._replace(texts=texts, prompts=prompts, reward=reward)


def programs(setup: Setup) -> PPOStage:
    """The stage without its prompts and its reward."""
    config, model = setup.config[NAME], setup.model
    settings = _settings(setup)
    optimizer = make_optimizer(config.optimizer)
    value = run_setup.scalar(setup).model
    limit = {"max_logits": setup.max_logits}
    stop = stop_tokens(setup.tokenizer, setup.config.model.path)
    stage = PPOStage(
        setup=setup,
        texts=[],
        prompts=[],
        reward=None,
        settings=settings,
        optimizer=optimizer,
        hyper=_hyper(config),
        sampler=build_sampler(model, max_new_tokens=config.max_new_tokens, stop=stop),
        update=None,
        score=jax.jit(build_score(model, **limit)),
    )
    update = jax.jit(
        ppo.build_update(model, value, settings, optimizer, **limit),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, _abstract(stage)), None),
    )
    return stage._replace(update=update)


def lower(stage: PPOStage, prompt: int) -> jax.stages.Lowered:
    """The update for prompts of so many tokens, from shapes alone."""
    batch, count, new = (stage.config[key] for key in ("batch_size", "samples", "max_new_tokens"))
    each, multiple = batch * count, stage.rows_of_update
    shape = ppo.row_shape(prompt, new)._replace(rows=-(-each // multiple) * multiple)
    rows = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.asarray(x[0]), empty(shape)))
    one = lambda dtype, *size: jax.ShapeDtypeStruct(size, dtype)
    place, lengths = one(jnp.int32, shape.rows, new), one(jnp.int32, each)
    responses = ppo.Responses(rows, place, lengths, one(bool, each))
    state = _abstract(stage)
    scores = one(jnp.float32, each)
    return stage.update.lower(state, state.policy.params, responses, scores, stage.hyper)


def describe(stage: PPOStage) -> str:
    """One line: the models, the mesh, the prompts and an iteration."""
    config, setup = stage.config, stage.setup
    mesh = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    size = sum(x.size for x in jax.tree.leaves(setup.abstract_params))
    return (
        f"{NAME}: {size:,} parameters and a value model of the same trunk on a mesh of {mesh}; "
        f"{len(stage.texts):,} prompts; {stage.steps:,} iterations of {config.batch_size} prompts "
        f"with {config.samples} response(s) each, in {config.epochs} epoch(s) of "
        f"{config.minibatches} minibatches; reward {stage.reward.name}"
    )


def train(stage: PPOStage, start: Callable[[], dict], stop: StopSignal) -> dict:
    """The policy's final parameters, float32. `start` gives those it begins with, which become the
    reference and whose buffers are taken over; a resumed stage skips it.

    Raises:
      NonFiniteLoss: the last good checkpoint is untouched.
      Preempted: after a SIGTERM, once the state is saved.
      RewardError: see `rewards.Reward`. CheckpointError.
    """
    setup = stage.setup
    with Checkpoints(
        stage.folder / "checkpoints", max_checkpoints=setup.config.max_checkpoints
    ) as saved:
        done = saved.latest
        if done == stage.steps:
            return run_setup.trained_params(setup, NAME)
        if done is None:
            params = start()
            kept = {"fingerprint": fingerprint(params)}
            checkpoints.save_tree(stage.folder / "reference", params, kept)
            state = _new_state(stage, params)
        else:
            state, _ = saved.restore(_abstract(stage))
        resumed = -1 if done is None else done
        with MetricWriter(
            stage.folder, tensorboard=setup.config.tensorboard, resume_step=resumed
        ) as writer:
            return _iterate(stage, state, load_reference(stage), saved, writer, stop).policy.params


def load_reference(stage: PPOStage) -> dict:
    """The parameters that the stage started from, float32."""
    return checkpoints.load_tree(stage.folder / "reference", stage.setup.abstract_params)


def _iterate(
    stage: PPOStage,
    state: PPOState,
    reference: dict,
    saved: Checkpoints,
    writer: MetricWriter,
    stop: StopSignal,
) -> PPOState:
    """The iterations from the state's on to the last."""
    config, steps = stage.setup.config, stage.steps
    every = Every(config.log_every, config.evaluate_every, config.checkpoint_every)
    window, clocks, done = Window(), [], int(state.iteration)
    ask = open_samples(stage.setup, reference, stage.score)

    def evaluate():
        found = ask(state.policy.params)
        append(stage.folder, done, found)
        values = found.metrics()
        writer.write(done, values, split="eval")
        if jax.process_index() == 0:
            tqdm.write(f"{NAME}  {_evaluation_line(done, steps, values)}")

    if done == 0:
        evaluate()
    with progress(steps, done, NAME) as bar:
        while done < steps:
            state, report, seconds = _iteration(stage, state, reference, done)
            done += 1
            if not bool(report.finite):
                raise NonFiniteLoss(
                    f"{NAME}: loss or gradient is not finite in iteration {done}. The last good "
                    f"checkpoint ({saved.latest}) is kept; lower config.ppo.learning_rate or "
                    "config.ppo.value_learning_rate in a new workdir"
                )
            window.add(report.metrics)
            clocks.append(seconds)
            bar.update()
            log, evaluating, save = every.due(done, steps)
            stopping = stop.agreed(done)
            if log:
                values = window.flush() | _pace(clocks)
                writer.write(done, values)
                bar.set_postfix_str(
                    f"reward {values['objective/scores']:.3f}, kl {values['objective/kl']:.2f}"
                )
            if evaluating:
                evaluate()
            if save or stopping:
                saved.save(done, state, metadata={"stage": NAME})
            if stopping and done < steps:
                saved.wait()
                raise Preempted(f"{NAME}: stopped at iteration {done} of {steps}, saved")
    saved.wait()
    return state


def _iteration(
    stage: PPOStage, state: PPOState, reference: dict, iteration: int
) -> tuple[PPOState, Report, np.ndarray]:
    """The state after one more iteration, its report, and the seconds of its three parts."""
    clock = [time.perf_counter()]
    texts, prompts = stage.batch(iteration)
    drawn = ppo.draw(stage.sampler, state, prompts, samples=stage.config.samples)
    samples = sharding.to_host(drawn)
    clock.append(time.perf_counter())
    scores = _scores(stage, texts, prompts, samples)
    clock.append(time.perf_counter())
    factor = make_schedule(stage.config.schedule, stage.config.warmup_steps, stage.steps)(iteration)
    hyper = stage.hyper | {"learning_rate": stage.hyper["learning_rate"] * factor}
    responses = ppo.pack(prompts, samples, multiple=stage.rows_of_update)
    state, report = stage.update(state, reference, responses, scores.ravel(), hyper)
    jax.block_until_ready(report.finite)
    clock.append(time.perf_counter())
    return state, report, np.diff(clock)


def _scores(stage: PPOStage, texts: Sequence[str], prompts: Prompts, samples) -> np.ndarray:
    """The rewards of samples on the host, float32 [B, N]."""
    asked, responses = [], []
    for row, (text, length) in enumerate(zip(texts, prompts.lengths)):
        own = [
            Sample(*(x[row, n, :end] for x in samples[:3]), bool(samples.stopped[row, n]))
            for n, end in enumerate(samples.lengths[row])
        ]
        responses += response_texts(stage.setup.tokenizer, prompts.tokens[row, :length], own)
        asked += [text] * len(own)
    return np.float32(stage.reward(asked, responses)).reshape(samples.lengths.shape)


def _pace(clocks: list[np.ndarray]) -> dict[str, float]:
    """Median seconds of an iteration's parts since the last call; the first one compiles."""
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


def _new_state(stage: PPOStage, params: dict) -> PPOState:
    setup = stage.setup
    _, value = ppo.with_value_head(setup.model.config, params)
    return ppo.new_ppo_state(
        params,
        value,
        stage.optimizer,
        setup.mesh,
        SHARDING_RULES,
        seed=setup.config.seed,
        kl_coefficient=stage.config.kl_coefficient,
    )


def _abstract(stage: PPOStage) -> PPOState:
    setup = stage.setup
    policy, value = (
        abstract_state(one.abstract_params, stage.optimizer, setup.mesh, SHARDING_RULES)
        for one in (setup, run_setup.scalar(setup))
    )
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=sharding.replicated(setup.mesh))
    return PPOState(policy, value, AdaptiveKL(scalar(jnp.float32)), scalar(jnp.int32))


def _settings(setup: Setup) -> PPO:
    config, micro_rows = setup.config[NAME], setup.config.micro_rows
    rows = config.batch_size * config.samples // config.minibatches
    if micro_rows and rows % micro_rows:
        raise ConfigError(
            f"config.micro_rows = {micro_rows}: does not divide the {rows} responses of a "
            "minibatch of PPO; 0 takes them at once"
        )
    return PPO(
        epochs=config.epochs,
        minibatches=config.minibatches,
        micro_batches=rows // (micro_rows or rows),
        entropy=config.entropy,
    )


def _hyper(config) -> Hyper:
    names = ("learning_rate", "value_learning_rate", "clip", "value_clip", "discount", "gae_lambda")
    names += ("kl_target", "missing_eos_penalty", "value_warmup")
    numbers = {name: config[name] for name in names}
    numbers |= {name: config[name] or math.inf for name in ("kl_horizon", "max_kl")}
    return ppo.hyper(**numbers)


def _prompts(setup: Setup) -> tuple[list[str], list[np.ndarray]]:
    """The prompts to train on, as texts and as token ids."""
    config, seed = setup.config[NAME], setup.config.seed
    how = {"split": "train", "limit": config.limit, "seed": seed}
    texts = read_prompts(config.prompts, tokenizer=setup.tokenizer, **how)
    if len(texts) < config.batch_size:
        raise ConfigError(
            f"config.ppo.batch_size = {config.batch_size}: {config.prompts} has only {len(texts)} "
            "prompts; lower it"
        )
    prompts = encode_prompts(setup.tokenizer, texts)
    new, positions = config.max_new_tokens, setup.model.config.max_positions
    for number, ids in enumerate(prompts):
        if not len(ids) or len(ids) + new > positions:
            raise ConfigError(
                f"config.ppo.prompts ({config.prompts}), prompt {number}: {len(ids)} tokens and "
                f"max_new_tokens = {new} new ones, but the model has {positions} positions, and a "
                "prompt at least one token; cut the prompt or lower max_new_tokens"
            )
    return texts, prompts


def summarise(stage: PPOStage, params: dict) -> dict:
    """Compare the evaluations before the first iteration and after the last; save the table.

    Writes summary.json and summary.txt into the stage's folder. `params` were evaluated then.
    """
    del params
    if jax.process_index() > 0:  # the files are the first one's
        return {}
    lines = read_metrics(stage.folder, "eval")
    of = lambda line: {name: x for name, x in line.items() if name.startswith("samples/")}
    values = {"before": of(lines[0]), "after": of(lines[-1])}
    shown, asked = last_samples(stage.folder), stage.setup.config.samples
    how = {"split": "eval", "limit": asked.count, "seed": SEED, "tokenizer": stage.setup.tokenizer}
    count = len(read_prompts(asked.prompts, **how))  # of which some may be the same
    result = {"prompts": count, "per_prompt": asked.per_prompt, "values": values}
    text = _table(result, asked.reward)
    for one in shown[:SHOWN]:
        cut = "" if one["stopped"] else " [...]"
        text += f"\n{one['reward']:+.3f}  {one['prompt']} |{one['response']}{cut}"
    (stage.folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    (stage.folder / "summary.txt").write_text(text + "\n")
    return result


def _table(result: dict, reward: str) -> str:
    values = result["values"]

    def number(name: str, shown: Callable[[float], str]) -> list[str]:
        return [shown(values[when][f"samples/{name}"]) for when in ("before", "after")]

    def estimate(name: str) -> list[str]:
        value = number(name, lambda x: f"{round(x, 3) + 0.0:.3f}")  # no -0.000
        return [f"{x} ± {e}" for x, e in zip(value, number(f"{name}_error", "{:.3f}".format))]

    rows = [
        ("", "before", "after"),
        ("reward", *estimate("reward")),
        ("KL(policy || reference) (nats/response)", *estimate("kl")),
        ("the same by exact KLs of tokens", *estimate("kl_of_tokens")),
        ("length (tokens)", *number("length", lambda x: f"{x:.1f}")),
        ("stopped by themselves", *number("stopped", lambda x: f"{100 * x:.1f} %")),
        ("distinct 2-grams", *number("distinct_2", lambda x: f"{100 * x:.1f} %")),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    title = (
        f"PPO, judged by {reward}: {result['prompts']} held-out prompts with "
        f"{result['per_prompt']} responses each (± standard error)"
    )
    rule = "-" * len(lines[0])
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule])
