"""The models of the torch systems."""

from __future__ import annotations

import torch
from cases import Case
from transformers import AutoModelForCausalLM

OFF = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def build(case: Case):
    """A model in float32, without dropout, on the case's device."""
    off = OFF if case.family == "gpt2" else {}
    model = AutoModelForCausalLM.from_pretrained(
        case.weights, dtype=torch.float32, trust_remote_code=False, **off
    )
    return model.to(case.device)


def device_peak() -> int | None:
    """The most bytes of tensors on the GPU; None where there is none."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
