import pytest

# For XLA: most of a test's time goes into compiling programs that run for milliseconds. What
# tests/test_benchmarks.py starts goes without these flags, as a user's programs do.
QUICK_COMPILES = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def further(*cases: object) -> list:
    """More cases of a law that other cases show already, for `parametrize`: CI leaves them out."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*arguments, marks=pytest.mark.long) for arguments in values]
