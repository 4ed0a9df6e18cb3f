"""A plain torch step in the style of the DPO authors' trainer: python plain_torch.py CASE STEPS

Chosen and rejected sequences concatenated and padded, full float32 logits, log-softmax and gather,
the reference's forward pass without gradient, clipping, AdamW.
"""

from __future__ import annotations

import contextlib
import copy
import sys

import torch
from cases import BETA, CLIP, WARM, Case, Pair, StepResult, batches, read_case, report
from torch.nn import functional
from torch_models import build, device_peak

IGNORED = -100


def main(case: Case, steps: int) -> None:
    policy = build(case).train()
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=case.learning_rate, weight_decay=0.0, fused=case.device != "cpu"
    )
    all_batches = batches(case, WARM + steps)
    frozen = [None] * len(all_batches)
    if case.reference == "cached":
        with torch.no_grad():
            frozen = [_logprobs(reference, _padded(batch, case), case) for batch in all_batches]
        del reference

    def step(index: int) -> StepResult:
        batch = _padded(all_batches[index], case)
        logprobs, theirs = _logprobs(policy, batch, case), frozen[index]
        if theirs is None:
            with torch.no_grad():
                theirs = _logprobs(reference, batch, case)
        chosen, rejected = (logprobs - theirs).chunk(2)
        loss = -functional.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss.detach())
        return StepResult(loss.item(), norm.item(), int((batch[2] != IGNORED).sum()))

    report(step, steps, device_peak)


def _padded(batch: list[Pair], case: Case) -> tuple[torch.Tensor, ...]:
    """Ids, mask and labels of all chosen sequences, then all rejected ones."""
    rows = [(p.prompt, p.chosen) for p in batch] + [(p.prompt, p.rejected) for p in batch]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
        mask[row, :end] = 1
    return tuple(x.to(case.device) for x in (ids, mask, labels))


def _logprobs(model, batch, case: Case) -> torch.Tensor:
    """The log-prob of every sequence's response, nats."""
    ids, mask, labels = batch
    low = torch.autocast(case.device, torch.bfloat16)
    with low if case.dtype == "bfloat16" else contextlib.nullcontext():
        logits = model(ids, attention_mask=mask).logits.float()
    labels = labels[:, 1:]
    scored = labels != IGNORED
    targets = labels.masked_fill(~scored, 0)[..., None]
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0]
    return (logprobs * scored).sum(-1)


if __name__ == "__main__":
    main(read_case(sys.argv[1]), int(sys.argv[2]))
