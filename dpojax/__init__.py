"""Direct Preference Optimization in JAX."""

import os
import time

from dpojax.extras import refuse_training_without_its_libraries

__version__ = "0.1.0"
BEGAN = time.monotonic()  # about when this process did: it imports little before dpojax

# It would tell every user to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
refuse_training_without_its_libraries()
