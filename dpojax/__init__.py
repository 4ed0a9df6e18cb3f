"""Direct Preference Optimization in JAX."""

import os

# It would tell every user to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
