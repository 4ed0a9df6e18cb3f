from importlib.metadata import version

import pytest

# For XLA: most of a test's time goes into compiling programs that run for milliseconds. What
# tests/test_benchmarks.py starts goes without these flags, as a user's programs do. A flag that XLA
# does not know ends the process: jax 0.11 has no choice of fusion emitters any more.
QUICK_COMPILES = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):
    QUICK_COMPILES += " --xla_cpu_use_fusion_emitters=false"


def further(*cases: object) -> list:
    """More cases of a law that other cases show already, for `parametrize`: CI leaves them out."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*arguments, marks=pytest.mark.long) for arguments in values]
