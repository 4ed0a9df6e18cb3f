# For XLA: most of a test's time goes into compiling programs that run for milliseconds.
QUICK_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
