"""Trains a stage of examples to its end, from its start or from its newest checkpoint."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpojax import display, sharding, stopping
from dpojax.data.packing import Shape
from dpojax.data.rows import Rows, empty
from dpojax.logprobs import TokenStatistics
from dpojax.losses import RunningMean
from dpojax.models.decoder import SHARDING_RULES
from dpojax.models.lora import LORA_RULES
from dpojax.stages import kept_weights
from dpojax.stages.example_stage import EvaluateSamples, ExampleStage
from dpojax.stages.kept import has_ended, new_keep_best, new_stop_at
from dpojax.stages.reference import MeasureKL, Reference
from dpojax.stages.references import check_identity, scores_at_start
from dpojax.stages.setup import with_scalar_params
from dpojax.stages.stage import Lowered, announce_kept, open_metrics
from dpojax.training import profile
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.forward import FrozenWeights, adapted
from dpojax.training.health import Health
from dpojax.training.loop import Every, TrainLoop, print_line
from dpojax.training.memory import Footprint, lean, predict
from dpojax.training.metrics import MetricWriter, Window, read_metrics
from dpojax.training.pace import Speed
from dpojax.training.preemption import StopSignal
from dpojax.training.profile import Spans
from dpojax.training.state import (
    State,
    abstract_state,
    make_optimizer,
    moment_copies,
    new_state,
    schedule_of,
    warmup_steps,
)
from dpojax.training.step import build_step
from dpojax.training.throughput import flops_of_batch, makers_peak, peak_flops
from dpojax.training.vectorised_step import MakeStep, MemberStates


def train_stage(stage: ExampleStage, start: Callable[[], dict], stop: StopSignal) -> dict:
    """The stage's final parameters, or its best ones where it keeps them; see `Stage.train`.

    Where the stage has adapters, the train state holds the adapters alone, and the frozen base is
    an argument of the step. The parameters returned are merged.

    Raises:
      what `TrainLoop` raises; ReferenceMismatch; CheckpointError.
    """
    setup, config = stage.setup, stage.setup.config
    with (
        Checkpoints(stage.checkpoint_folder, max_checkpoints=config.max_checkpoints) as checkpoints,
        ExitStack() as writing,
    ):
        done = checkpoints.latest
        if has_ended(checkpoints, stage.steps):
            return stage.trained_params()
        params = start() if done is None else None
        if done is not None:
            kept_weights.mend(stage.kept_weights(start))
        if params is not None and setup.model.config.scalar_head:
            params = with_scalar_params(setup, params)
        base = None if stage.adapters is None else stage.adapters.keep_base(params)
        reference = stage.open_reference(params, base, stop, writing)
        optimizer = make_optimizer(stage.config.optimizer)
        abstract = abstract_train_state(stage, optimizer)
        batches = stage.batches.training(reference.attach)
        first_scores = None
        with open_metrics(stage, done) as writer:
            if params is None:
                state, _ = checkpoints.restore(abstract, batches)
                print_line(stage.name, f"resumes at step {done} of {stage.steps}")
            else:
                trained = params if base is None else stage.adapters.start(config.seed)
                if stage.starts_at_reference:
                    policy = stage.policy_params(base, trained)
                    first_scores = scores_at_start(stage, policy, reference)
                    identity = check_identity(stage, first_scores, reference)
                    writer.write(0, identity, split="identity")
                state = new_state(trained, optimizer, abstract, config.seed)
            writing.close()  # no checkpoint before the reference's weights are complete on disk
            evaluator = open_evaluator(stage, base, reference)._replace(first_scores=first_scores)
            loop = _train_loop(stage, evaluator, optimizer, batches, checkpoints, writer, stop)
            finished = loop(state)
            if config.profile:
                _profile(stage, loop, finished, evaluator)
            if loop.keep_best is not None:
                announce_kept(stage)
                return stage.trained_params()
            return stage.policy_params(base, finished.params)


class Evaluator(NamedTuple):
    """Evaluates the policies of a stage, or of stages that differ in traced numbers alone.

    Attributes:
      base: of adapters; None where all weights are trained.
      reference: gives rows their reference log-probs.
      held_out: NumPy rows, with reference log-probs where they are cached.
      samples: metrics of sampled responses; None where the config asks for none.
      first_scores: what the policy at step 0 scores on the first held-out batch, where known.
    """

    base: dict | None
    reference: Reference
    held_out: list[Rows]
    samples: EvaluateSamples | None
    first_scores: TokenStatistics | None = None

    def __call__(self, stage: ExampleStage, state: State) -> dict[str, float]:
        policy, step = stage.policy_params(self.base, state.params), int(state.step)
        metrics = evaluate_batches(
            stage,
            policy,
            (self.reference.to_device(rows, stage.setup.mesh) for rows in self.held_out),
            baseline=state.baseline,
            reference=self.reference.params,
            first_scores=self.first_scores if step == 0 else None,
            begin_kl=self.reference.begin_kl,
        )
        if self.samples is not None:
            metrics |= self.samples(policy, step, stage.folder)
        return metrics


def open_evaluator(stage: ExampleStage, base: dict | None, reference: Reference) -> Evaluator:
    held_out = list(stage.batches.held_out(reference.attach))
    return Evaluator(base, reference, held_out, stage.open_samples(base))


def evaluate_batches(
    stage: ExampleStage,
    params: dict,
    batches: Iterator[Rows],
    *,
    baseline: RunningMean | None = None,
    reference: dict | None = None,
    first_scores: TokenStatistics | None = None,
    begin_kl: Callable[[], MeasureKL] | None = None,
) -> dict[str, float]:
    """Metrics on the held-out batches, which lie on the mesh: sums over all, divided once.

    With several sources, those of one source alone are there as well: "SOURCE/METRIC".

    Args:
      baseline: of the train state, for the objectives that keep one.
      reference: parameters of a live reference.
      first_scores: what `score` gives on the first batch, where that is known.
      begin_kl: see `Reference`.
    """
    hyper = stage.hyper
    if baseline is not None and stage.programs.objective.baseline is not None:
        hyper = hyper | {"delta": baseline.mean}
    if "kl" not in stage.programs.objective.statistics:
        reference = None  # only the divergence needs more of it than its log-probs
    measure_kl = None if begin_kl is None else begin_kl()
    window, by_source = Window(), defaultdict(Window)
    sources = stage.batches.held_out_sources or itertools.repeat("")
    for index, (rows, source) in enumerate(zip(batches, sources)):
        stopping.between_batches()
        outputs, first_scores = first_scores, None
        if outputs is None:
            outputs = stage.programs.score(params, rows, reference=reference)
        metrics = stage.programs.metrics(outputs, rows, hyper)
        if measure_kl is not None:
            metrics = metrics | measure_kl(index, params, rows)
        window.add(metrics)
        if source:
            by_source[source].add(metrics)
    values = window.flush()
    for source, part in by_source.items():
        values |= {f"{source}/{name}": value for name, value in part.flush().items()}
    return values


def metric_names(stage: ExampleStage) -> list[str]:
    """The names of what `evaluate_batches` returns, from shapes alone."""
    rows, params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (abstract_rows(stage, Shape(1, 1, 8, 8, 1, 2)), stage.setup.abstract_params),
    )
    programs = stage.programs
    reference = params if "kl" in programs.objective.statistics else None

    def metrics(params, rows, reference, hyper):
        outputs = programs.score(params, rows, reference=reference)
        return programs.metrics(outputs, rows, hyper)

    with jax.set_mesh(stage.setup.mesh):
        return sorted(jax.eval_shape(metrics, params, rows, reference, stage.hyper))


def abstract_train_state(stage: ExampleStage, optimizer: optax.GradientTransformation) -> State:
    """Shapes and shardings of the train state: of the whole model, or of the adapters alone."""
    setup, adapters = stage.setup, stage.adapters
    params, rules = setup.abstract_params, SHARDING_RULES
    if adapters is not None:
        params, rules = adapters.abstract, LORA_RULES
    with_reference = bool(stage.programs.objective.sync_every)
    return abstract_state(params, optimizer, setup.mesh, rules, with_reference=with_reference)


def make_step(stage: ExampleStage, optimizer: optax.GradientTransformation) -> MakeStep:
    """(warm-up steps, steps) -> the stage's step, not jitted; see `jitted_step`."""
    forward = stage.programs.forward
    if stage.adapters is not None:
        forward = adapted(forward, stage.adapters.config)

    def make(warmup, steps):
        schedule = schedule_of(stage.config, warmup, steps)
        return build_step(forward, stage.programs.objective, optimizer, schedule)

    return make


def jitted_step(
    stage: ExampleStage, optimizer: optax.GradientTransformation, steps: int
) -> Callable:
    """(state, rows, hyper, frozen weights) -> (state, report); donates the state."""
    step = make_step(stage, optimizer)(warmup_steps(stage.config, steps), steps)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_train_state(stage, optimizer))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def frozen_weights(base: dict | None, reference: Reference) -> FrozenWeights:
    """What a step reads besides its state. A live reference that is the base is left out."""
    live = None if reference.params is base else reference.params
    return FrozenWeights(base=base, reference=live)


def abstract_frozen_weights(stage: ExampleStage) -> FrozenWeights:
    """The shapes of `frozen_weights`."""
    if stage.adapters is not None:
        return FrozenWeights(base=stage.adapters.abstract_base)
    reads_weights = stage.programs.objective.reads_live_reference
    return FrozenWeights(reference=stage.live_reference_shapes() if reads_weights else None)


def resident_weights(stage: ExampleStage) -> tuple:
    """Shapes of all weights that lie beside a stage's state while it trains.

    The adapters' base, a live reference, and the reference that samples are compared with.
    """
    base = None if stage.adapters is None else stage.adapters.abstract_base
    return base, stage.live_reference_shapes(), stage.sampled_reference_shapes()


def footprint(
    stage: ExampleStage, *, states: MemberStates | None = None, members: int = 1
) -> Footprint:
    """What the stage's step will need of each device, predicted from shapes alone.

    Args:
      stage: on the mesh of the step.
      states: shapes and shardings of the members of a sweep; None for a single run.
      members: of them, whose steps a device computes at once.
    """
    config, setup = stage.setup.config, stage.setup
    optimizer = make_optimizer(stage.config.optimizer)
    return predict(
        setup.model.config,
        stage.batches.shape,
        setup.mesh,
        state=abstract_train_state(stage, optimizer) if states is None else states.states,
        frozen=resident_weights(stage),
        remat=config.model.remat,
        dtype=config.model.compute_dtype,
        kernel=setup.model.kernel,
        max_logits=setup.max_logits,
        members=members,
    )


def memory_advice(stage: ExampleStage) -> dict[str, str]:
    """See `Stage.memory_advice`."""
    shape, key = stage.batches.shape, f"config.{stage.name}"
    advice = {
        "activations": f"lower config.micro_rows (now {shape.rows} rows of {shape.length} "
        "tokens), or set config.model.remat to full",
        "logits": "lower config.max_logits",
        "frozen": f"store the base in bfloat16 ({key}.lora.base_dtype)",
        "": "spread the model over more devices (config.mesh.fsdp)",
    }
    if stage.adapters is None:
        advice["frozen"] = f"cache the reference ({key}.reference.kind), or store it in bfloat16"
        if "lora" in stage.config:
            advice[""] += f", or train adapters alone ({key}.lora.rank)"
    return advice


def lower(stage: ExampleStage, length: int, responses: int) -> Lowered:
    """See `Stage.lower`; rows of `length` tokens with one example each."""
    config = stage.config
    micro_rows = stage.setup.config.micro_rows or config.batch_size
    micro_batches = -(-config.batch_size // micro_rows)
    shape = Shape(micro_batches, micro_rows, length, length, 1, responses)
    return Lowered(
        step=lower_step(stage, shape),
        rows=f"{micro_batches} x {micro_rows} rows of {length} tokens",
        weight_copies=2 + moment_copies(config.optimizer),
    )


def lower_step(stage: ExampleStage, shape: Shape) -> jax.stages.Lowered:
    """The step for rows of a shape, from shapes alone; the mesh's devices need not be there."""
    optimizer = make_optimizer(stage.config.optimizer)
    spread = NamedSharding(stage.setup.mesh, PartitionSpec(None, sharding.ROWS))
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread),
        abstract_rows(stage, shape),
    )
    step, hyper = jitted_step(stage, optimizer, steps=1), jax.eval_shape(lambda: stage.hyper)
    state, frozen = abstract_train_state(stage, optimizer), abstract_frozen_weights(stage)
    with jax.set_mesh(stage.setup.mesh):  # nothing is computed inside: devices may be absent
        return step.lower(state, rows, hyper, frozen)


def abstract_rows(stage: ExampleStage, shape: Shape) -> Rows:
    """A batch of padding, with reference log-probs where the objective needs them."""
    rows = empty(shape)
    if stage.programs.objective.needs_reference:
        rows = rows._replace(reference=np.zeros(rows.target.shape, np.float32))
    return rows


def _train_loop(
    stage: ExampleStage,
    evaluator: Evaluator,
    optimizer: optax.GradientTransformation,
    batches: Iterator[Rows],
    checkpoints: Checkpoints,
    writer: MetricWriter,
    stop: StopSignal,
) -> TrainLoop:
    setup, config = stage.setup, stage.setup.config
    frozen = frozen_weights(evaluator.base, evaluator.reference)

    def say(text: str) -> None:
        if jax.process_index() == 0:
            display.say(f"{stage.name}: {text}")

    step = lean(jitted_step(stage, optimizer, stage.steps), say=say)
    speed = speed_on(setup.mesh, stage)
    if config.profile:
        speed.ceiling()  # measured now, and not among the steps that the trace shows
    return TrainLoop(
        stage=stage.name,
        step=lambda state, rows, hyper: step(state, rows, hyper, frozen),
        batches=batches,
        to_device=lambda rows: evaluator.reference.to_device(rows, setup.mesh),
        evaluate=lambda state: evaluator(stage, state),
        speed=speed,
        hyper=stage.hyper,
        steps=stage.steps,
        every=Every(config.log_every, config.evaluate_every, config.checkpoint_every),
        examples=stage.batches.data.examples,
        checkpoints=checkpoints,
        writer=writer,
        stop=stop,
        keep_best=new_keep_best(stage.config),
        stop_at=new_stop_at(stage.config),
        spans=Spans(stage.folder if config.profile else None),
        health=Health(read_metrics(stage.folder, "eval")),
    )


def speed_on(mesh: Mesh, stage: ExampleStage) -> Speed:
    """How fast steps of this stage are on all devices of `mesh`."""
    return Speed(
        flops_of_batch(stage.setup.abstract_params, frozen=stage.adapters is not None),
        partial(peak_flops, mesh, stage.setup.config.model.compute_dtype),
        mesh.size,
        makers_peak(mesh),
    )


def _profile(stage: ExampleStage, loop: TrainLoop, state: State, evaluator: Evaluator) -> None:
    """Prints, and keeps in the stage's folder, where the time went."""
    forward, optimizer = stage.programs.forward, make_optimizer(stage.config.optimizer)
    if stage.adapters is not None:
        forward = adapted(forward, stage.adapters.config)
    indices = stage.batches.data.training[: stage.config.batch_size]
    batch = next(stage.batches.rows(indices, evaluator.reference.attach))
    parts = profile.parts_of_step(
        jitted_step(stage, optimizer, stage.steps),
        forward,
        stage.programs.objective,
        state,
        evaluator.reference.to_device(batch, stage.setup.mesh),
        stage.hyper,
        frozen_weights(evaluator.base, evaluator.reference),
    )
    utilisation = loop.speed.flops_of(batch) / sum(parts.values()) / loop.speed.ceiling()
    if jax.process_index() == 0:
        print(f"\n{stage.name}\n{profile.write(stage.folder, loop.spans, parts, utilisation)}")
