"""Direct Preference Optimization in JAX."""

import os
import time

# It would tell every user to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

BEGAN = time.monotonic()  # about when this process did: it imports little before dpojax
