"""Flags of the TPU's compiler that every command sets, and every plan."""

from __future__ import annotations

import os

VARIABLE = "LIBTPU_INIT_ARGS"
# Under fsdp, products with large weights would become loops that pass shards of the weight from
# chip to chip, and wait for each ("windowed einsum"). Without these loops, weights are gathered
# whole, beside other kernels.
FLAGS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def use_tpu_flags() -> None:
    """Add these flags to the environment; those that it names already stay as they are.

    To be called before JAX opens its devices. Without a TPU they are not read.
    """
    in_force = os.environ.get(VARIABLE, "")
    missing = [f"--{name}={value}" for name, value in FLAGS.items() if f"--{name}=" not in in_force]
    os.environ[VARIABLE] = " ".join([*filter(None, [in_force]), *missing])
