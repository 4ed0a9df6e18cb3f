# For XLA: most of a test's time goes into compiling programs that run for milliseconds. What
# tests/test_benchmarks.py starts goes without these flags, as a user's programs do.
QUICK_COMPILES = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
