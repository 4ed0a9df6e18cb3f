"""Train one stage to its end, from its start or from its newest checkpoint."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from dpojax import sharding
from dpojax.config.checks import ConfigError
from dpojax.data.pipeline import train_batches
from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics
from dpojax.models import lora
from dpojax.models.decoder import SHARDING_RULES
from dpojax.models.lora import LORA_RULES
from dpojax.stages.references import (
    Reference,
    check_identity,
    first_scores,
    open_reference,
    weights_of,
)
from dpojax.stages.samples import append, open_ranks, open_samples
from dpojax.stages.setup import Setup, scored, trained_params
from dpojax.stages.stage import Stage, abstract_rows
from dpojax.training import profile, throughput
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.forward import adapted
from dpojax.training.loop import Every, StopSignal, TrainLoop
from dpojax.training.memory import Footprint, gib, lean, limit_bytes, predict
from dpojax.training.metrics import MetricWriter
from dpojax.training.profile import Spans
from dpojax.training.state import State, abstract_state, make_optimizer, make_schedule, new_state
from dpojax.training.step import build_step
from dpojax.training.vectorised_step import MakeStep


def train_stage(stage: Stage, start: Callable[[], dict], stop: StopSignal) -> dict:
    """The stage's final parameters, float32, or its best where it keeps them. `start` gives those
    it begins with, whose buffers are taken over; a resumed stage skips it.

    Where the stage has adapters, its state is that of the adapters alone, and the frozen base an
    argument of the step; the parameters returned are merged.

    Raises:
      what `TrainLoop` raises; `ReferenceMismatch`; `CheckpointError`.
    """
    setup, config = stage.setup, stage.setup.config
    folder = stage.folder / "checkpoints"
    with (
        Checkpoints(folder, max_checkpoints=config.max_checkpoints) as saved,
        ExitStack() as writing,
    ):
        done = saved.latest
        if done == stage.steps:
            return trained_params(setup, stage.name)
        params = start() if done is None else None
        if params is not None and setup.model.config.scalar_head:
            params = scored(setup, params)
        base = None if stage.lora is None else stage.lora.keep_base(params)
        used = reference_of(stage, params, base, stop, writing)
        optimizer = make_optimizer(stage.config.optimizer)
        abstract = abstract_of(stage, optimizer)
        batches = train_batches(
            stage.data.examples,
            stage.order,
            stage.shape,
            score_prompt=stage.score_prompt,
            attach=used.attach,
        )
        resumed, first = -1 if done is None else done, None
        with MetricWriter(
            stage.folder, tensorboard=config.tensorboard, resume_step=resumed
        ) as writer:
            if params is None:
                state, _ = saved.restore(abstract, batches)
            else:
                trained = params if base is None else stage.lora.start(config.seed)
                if stage.objective.needs_reference and stage.starts_at_reference:
                    first = first_scores(stage, policy_of(stage, base, trained), used)
                    writer.write(0, check_identity(stage, first, used), split="identity")
                state = new_state(trained, optimizer, abstract, config.seed)
            writing.close()  # no checkpoint without the reference's weights
            judge = open_evaluator(stage, base, used)._replace(first=first)
            fit = _fit(stage, judge, optimizer, abstract, batches, saved, writer, stop)
            finished = fit(state)
            if config.profile:
                _profile(stage, fit, finished, base, used, abstract)
            if stage.keep_best:
                return trained_params(setup, stage.name)
            return policy_of(stage, base, finished.params)


class Evaluator(NamedTuple):
    """What evaluates the policies of a stage, or of stages that differ in traced numbers alone.

    held_out: NumPy rows, with reference log-probs where they are cached.
    sampled: (params, step, folder) -> metrics of what the policy says; None where nobody asks.
    first: what the policy at step 0 scores on the first of them, where that is known.
    """

    base: dict | None
    used: Reference
    held_out: list[Rows]
    sampled: Callable[[dict, int, pathlib.Path], dict[str, float]] | None
    first: TokenStatistics | None = None

    def __call__(self, stage: Stage, state: State) -> dict[str, float]:
        policy, step = policy_of(stage, self.base, state.params), int(state.step)
        found = stage.evaluate(
            policy,
            (self.used.to_device(rows, stage.setup.mesh) for rows in self.held_out),
            baseline=state.baseline,
            reference_params=self.used.params,
            first=self.first if step == 0 else None,
        )
        if self.sampled is None:
            return found
        return found | self.sampled(policy, step, stage.folder)


def open_evaluator(stage: Stage, base: dict | None, used: Reference) -> Evaluator:
    ask = stage.setup.config.samples.reward and stage.name == "dpo"
    sampled = _sampled(stage, weights_of(stage, None, base).params) if ask else None
    return Evaluator(base, used, list(stage.held_out(used.attach)), sampled)


def policy_of(stage: Stage, base: dict | None, trained: dict) -> dict:
    """The policy's parameters, from those that are trained."""
    return trained if base is None else stage.lora.merge(base, trained)


def abstract_of(stage: Stage, optimizer) -> State:
    setup, lora = stage.setup, stage.lora
    if lora is None:
        return abstract_state(setup.abstract_params, optimizer, setup.mesh, SHARDING_RULES)
    return abstract_state(lora.abstract, optimizer, setup.mesh, LORA_RULES)


def reference_of(
    stage: Stage,
    start: dict | None,
    base: dict | None,
    stop: StopSignal,
    writing: ExitStack | None = None,
) -> Reference:
    """What gives rows their reference log-probs, if the stage wants them; its weights are saved, on
    disk as `open_reference` says."""
    if stage.objective.needs_reference:
        return open_reference(stage, start, stop, base, writing)
    if stage.name == "dpo":
        weights_of(stage, start, base, writing)
    return Reference()


def _fit(
    stage: Stage,
    judge: Evaluator,
    optimizer,
    abstract: State,
    batches,
    saved,
    writer,
    stop,
) -> TrainLoop:
    setup, config = stage.setup, stage.setup.config
    frozen = judge.used.params if judge.base is None else judge.base
    say = lambda needed: _say(f"{stage.name}: the compiled step needs {needed}")
    step = lean(jitted_step(stage, optimizer, abstract), say=say)
    if config.profile:
        _ceiling(setup)  # now, and not among the steps that the trace shows
    return TrainLoop(
        stage=stage.name,
        step=lambda state, rows, hyper: step(state, rows, hyper, frozen),
        batches=batches,
        to_device=lambda rows: judge.used.to_device(rows, setup.mesh),
        evaluate=lambda state: judge(stage, state),
        flops=_flops(setup.abstract_params),
        ceiling=partial(_ceiling, setup),
        hyper=stage.hyper,
        steps=stage.steps,
        every=Every(config.log_every, config.evaluate_every, config.checkpoint_every),
        examples=stage.data.examples,
        checkpoints=saved,
        writer=writer,
        stop=stop,
        keep_best=stage.keep_best,
        spans=Spans(stage.folder if config.profile else None),
    )


def _say(text: str) -> None:
    """On the terminal, above the bar; of the first process alone."""
    if jax.process_index() == 0:
        tqdm.write(text)


def _profile(
    stage: Stage, fit: TrainLoop, state: State, base: dict | None, used: Reference, abstract: State
) -> None:
    """Print, and keep in the stage's folder, where the time went."""
    forward = stage.forward if base is None else adapted(stage.forward, stage.lora.config)
    frozen = used.params if base is None else base
    indices = stage.data.training[: stage.config.batch_size]
    batch = next(stage.rows(indices, used.attach))
    parts = profile.parts_of_step(
        jitted_step(stage, make_optimizer(stage.config.optimizer), abstract),
        forward,
        stage.objective,
        state,
        used.to_device(batch, stage.setup.mesh),
        stage.hyper,
        frozen,
    )
    utilisation = fit.flops(batch) / sum(parts.values()) / fit.ceiling()
    if jax.process_index() == 0:
        print(f"\n{stage.name}\n{profile.write(stage.folder, fit.spans, parts, utilisation)}")


def jitted_step(stage: Stage, optimizer, abstract: State) -> Callable:
    """(state, rows, hyper, frozen) -> (state, report); donates the state.

    `frozen` are the base's parameters under adapters, else the live reference's or None.
    """
    step = make_step(stage, optimizer)(stage.config.warmup_steps, stage.steps)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def abstract_frozen(stage: Stage) -> dict | None:
    """Shapes of the weights that a step reads and leaves: adapters' base, or the live reference of
    an objective that needs more of it than log-probs."""
    if stage.lora is not None:
        return stage.lora.abstract_base
    return _abstract_live(stage) if "kl" in stage.objective.statistics else None


def abstract_beside(stage: Stage) -> tuple:
    """Shapes of all weights that lie beside a stage's state while it trains: adapters' base, a live
    reference, and the reference whose samples policies are compared with."""
    base = None if stage.lora is None else stage.lora.abstract_base
    asked = stage.name == "dpo" and stage.setup.config.samples.reward and _own_reference(stage)
    return base, _abstract_live(stage), stage.setup.abstract_params if asked else None


def _abstract_live(stage: Stage) -> dict | None:
    if stage.name != "dpo" or stage.config.reference.kind != "live" or not _own_reference(stage):
        return None
    low = jnp.dtype(stage.config.reference.dtype)
    return jax.tree.map(lambda x: x.update(dtype=low), stage.setup.abstract_params)


def _own_reference(stage: Stage) -> bool:
    """Whether a preference stage's reference is not the base of its adapters."""
    return stage.lora is None or bool(stage.config.reference.path)


def footprint(stage: Stage) -> Footprint:
    """What the stage's step will want of each device, predicted from shapes alone."""
    config, setup = stage.setup.config, stage.setup
    frozen, kernels = abstract_beside(stage), None
    if stage.lora is not None:  # every pass makes merged weights of the base
        frozen = (frozen, setup.abstract_params)
        kernels = lora.adapted(setup.abstract_params, stage.lora.abstract)
    return predict(
        setup.model.config,
        stage.shape,
        setup.mesh,
        state=abstract_of(stage, make_optimizer(stage.config.optimizer)),
        frozen=frozen,
        adapted=kernels,
        remat=config.model.remat,
        dtype=config.model.compute_dtype,
        kernel=setup.model.kernel,
        max_logits=setup.max_logits,
    )


def require_memory(stage: Stage) -> None:
    """Raise ConfigError if the stage's footprint is more than a device has; it names what to change
    first."""
    mebi = 2**20  # what processes agree on is an int32
    wanted, limit = footprint(stage), mebi * sharding.agreed(min(limit_bytes() // mebi, 2**30))
    if stage.setup.config.check_memory and wanted.total > limit:
        shape, largest = stage.shape, max(wanted._asdict(), key=wanted._asdict().get)
        spread = "spread the model over more devices (config.mesh.fsdp)"
        if "lora" in stage.config and stage.lora is None:
            spread += f", or train adapters alone (config.{stage.name}.lora.rank)"
        frozen = f"store the base in bfloat16 (config.{stage.name}.lora.base_dtype)"
        if stage.lora is None:
            frozen = (
                "cache the reference (config.preference.reference.kind), or store it in bfloat16"
            )
        change = {
            "activations": f"lower config.micro_rows (now {shape.rows} rows of {shape.length} "
            "tokens), or set config.model.remat to full",
            "logits": "lower config.max_logits",
            "frozen": frozen,
        }.get(largest, spread)
        raise ConfigError(
            f"{stage.name}: a step will want about {wanted} of each device, which has "
            f"{gib(limit)} to give. Most are {largest}: {change}. config.check_memory=False tries "
            "all the same"
        )


def make_step(stage: Stage, optimizer) -> MakeStep:
    """(warm-up steps, steps) -> the stage's step, not jitted; see `jitted_step`."""
    forward = stage.forward
    if stage.lora is not None:
        forward = adapted(forward, stage.lora.config)

    def make(warmup_steps, steps):
        schedule = make_schedule(stage.config.schedule, warmup_steps, steps)
        return build_step(forward, stage.objective, optimizer, schedule)

    return make


def lower(stage: Stage) -> jax.stages.Lowered:
    """The step for rows of `stage.shape`, from shapes; without adapters or a live reference."""
    optimizer = make_optimizer(stage.config.optimizer)
    abstract, rows = abstract_of(stage, optimizer), abstract_rows(stage)
    spread = NamedSharding(stage.setup.mesh, PartitionSpec(None, sharding.ROWS))
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), rows)
    step, hyper = jitted_step(stage, optimizer, abstract), jax.eval_shape(lambda: stage.hyper)
    with jax.set_mesh(stage.setup.mesh):  # whose devices need not be there
        return step.lower(abstract, rows, hyper, None)


def _sampled(stage: Stage, reference: dict) -> Callable:
    """Metrics of what a policy says at a step; its texts go into the given folder."""
    ask = open_samples(stage.setup, reference, stage.score)
    of_reference = ask(reference)
    ranks = open_ranks(stage.setup, reference, stage.score, of_reference)

    def sampled(params: dict, step: int, folder: pathlib.Path) -> dict[str, float]:
        found = of_reference if step == 0 and stage.starts_at_reference else ask(params)
        append(folder, step, found)
        return found.metrics() | ranks(params).metrics()

    return sampled


def _flops(abstract_params: dict) -> Callable[[Rows], float]:
    """Model FLOPs of a batch's forward and backward pass, from the parameters' shapes."""
    body, head = throughput.product_weights(abstract_params)

    def of(rows: Rows) -> float:
        tokens, scored = int((rows.segment > 0).sum()), int((rows.response >= 0).sum())
        return throughput.model_flops(body, head, tokens, scored)

    return of


def _ceiling(setup: Setup) -> float:
    """FLOP/s of a matmul on all devices of the run together."""
    of_one = throughput.matmul_flops_per_second(setup.config.model.compute_dtype)
    return of_one * _independent_devices(setup.mesh)


def _independent_devices(mesh) -> int:
    """Devices with arithmetic of their own; CPU devices of a host share its cores."""
    if mesh.devices.flat[0].platform != "cpu":
        return mesh.size
    return len({device.process_index for device in mesh.devices.flat})
