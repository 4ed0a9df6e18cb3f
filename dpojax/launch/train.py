"""Train one stage to its end, from its start or from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import jax

from dpojax import sharding
from dpojax.data.pipeline import train_batches
from dpojax.data.rows import Rows
from dpojax.launch.references import Reference, check_identity, open_reference
from dpojax.launch.stages import Stage
from dpojax.models.decoder import SHARDING_RULES
from dpojax.training import checkpoints, throughput
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.loop import Every, Fit, StopSignal
from dpojax.training.metrics import MetricWriter
from dpojax.training.state import State, abstract_state, make_optimizer, make_schedule, new_state
from dpojax.training.step import build_step


def train_stage(stage: Stage, start: Callable[[], dict], stop: StopSignal) -> dict:
    """The stage's final parameters. `start` gives those it begins with; a resumed stage skips it.

    Raises:
      what `Fit` raises; `ReferenceMismatch`; `CheckpointError`.
    """
    setup, config = stage.setup, stage.setup.config
    folder = stage.folder / "checkpoints"
    with Checkpoints(folder, keep=config.keep) as saved:
        done = saved.latest
        if done == stage.steps:
            return checkpoints.load_params(folder, setup.abstract_params)
        params = start() if done is None else None
        used = (
            open_reference(stage, params, stop) if stage.objective.needs_reference else Reference()
        )
        optimizer = make_optimizer(stage.config.optimizer)
        abstract = abstract_state(setup.abstract_params, optimizer, setup.mesh, SHARDING_RULES)
        batches = train_batches(
            stage.data.examples,
            stage.order,
            stage.shape,
            score_prompt=stage.score_prompt,
            attach=used.attach,
        )
        resumed = -1 if done is None else done
        with MetricWriter(
            stage.folder, tensorboard=config.tensorboard, resume_step=resumed
        ) as writer:
            if params is None:
                state, _ = saved.restore(abstract, batches)
            else:
                if used != Reference() and not stage.config.reference.path:
                    writer.write(0, check_identity(stage, params, used), split="identity")
                state = new_state(params, optimizer, abstract, config.seed)
            fit = _fit(stage, used, optimizer, abstract, batches, saved, writer, stop)
            return fit(state).params


def _fit(
    stage: Stage, used: Reference, optimizer, abstract: State, batches, saved, writer, stop
) -> Fit:
    setup, config = stage.setup, stage.setup.config
    schedule = make_schedule(stage.config, stage.steps)
    step = build_step(
        setup.model, stage.objective, optimizer, schedule, max_logits=setup.max_logits
    )
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    held_out = list(stage.held_out(used.attach))

    def to_device(rows: Rows) -> Rows:
        return used.to_device(rows, setup.mesh)

    ceiling = throughput.matmul_flops_per_second(config.model.compute_dtype)
    return Fit(
        stage=stage.name,
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        batches=batches,
        to_device=to_device,
        evaluate=lambda params: stage.evaluate(params, map(to_device, held_out)),
        flops=_flops(setup.abstract_params),
        ceiling=ceiling * _independent_devices(setup.mesh),
        hyper=stage.hyper,
        steps=stage.steps,
        every=Every(config.log_every, config.evaluate_every, config.checkpoint_every),
        examples=stage.data.examples,
        checkpoints=saved,
        writer=writer,
        stop=stop,
    )


def _flops(abstract_params: dict) -> Callable[[Rows], float]:
    """Model FLOPs of a batch's forward and backward pass, from the parameters' shapes."""
    leaves = jax.tree_util.tree_flatten_with_path(abstract_params)[0]
    sizes = {sharding.path_of(keys): leaf.size for keys, leaf in leaves}
    body = sum(size for path, size in sizes.items() if path.startswith("blocks/"))
    head = sizes.get("head/kernel", sizes["embed/tokens"])

    def of(rows: Rows) -> float:
        tokens, scored = int((rows.segment > 0).sum()), int((rows.response >= 0).sum())
        return throughput.model_flops(body, head, tokens, scored)

    return of


def _independent_devices(mesh) -> int:
    """Devices with arithmetic of their own; CPU devices of a host share its cores."""
    if mesh.devices.flat[0].platform != "cpu":
        return mesh.size
    return len({device.process_index for device in mesh.devices.flat})
