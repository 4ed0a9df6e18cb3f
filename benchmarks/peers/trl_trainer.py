"""TRL's DPOTrainer: python trl_trainer.py CASE STEPS [--checkpointing]"""

from __future__ import annotations

import os
import sys
import tempfile

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
import transformers
import trl
from cases import BETA, CLIP, WARM, Case, Clock, StepResult, batches, read_case
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch_models import build, device_peak


class Timer(transformers.TrainerCallback):
    """From the end of a step to the end of the next, without the line that is logged between."""

    def __init__(self, steps: int):
        self.clock, self.left = Clock(), WARM + steps
        self.losses_and_norms: list[tuple[float, float]] = []

    def on_train_begin(self, args, state, control, **more):
        self.clock.start()

    def on_step_end(self, args, state, control, **more):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock.stop()
        self.left -= 1
        control.should_training_stop = self.left == 0

    def on_log(self, args, state, control, logs=None, **more):
        if "grad_norm" in logs:
            self.losses_and_norms.append((logs["loss"], logs["grad_norm"]))
            self.clock.start()


class Trainer(trl.DPOTrainer):
    """For a data set that is token ids already; counts the tokens that it scores."""

    def __init__(self, *args, **more):
        self.scored: list[int] = []
        super().__init__(*args, **more)

    def _prepare_dataset(self, dataset, *args):
        return dataset

    def compute_loss(self, model, inputs, *args, **more):
        self.scored.append(int(inputs["completion_mask"].sum()))
        return super().compute_loss(model, inputs, *args, **more)


def main(case: Case, steps: int, checkpointing: bool) -> None:
    model = build(case)
    reference = build(case) if case.reference == "live" else None
    pairs = [pair for batch in batches(case, WARM + steps) for pair in batch]
    fields = {"prompt_ids": 0, "chosen_ids": 1, "rejected_ids": 2}
    data = Dataset.from_dict({name: [pair[i] for pair in pairs] for name, i in fields.items()})
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=case.pairs,
            max_length=1024,
            gradient_checkpointing=checkpointing,
            bf16=case.dtype == "bfloat16",
            use_cpu=case.device == "cpu",
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            learning_rate=case.learning_rate,
            beta=BETA,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            weight_decay=0.0,
            max_steps=WARM + steps,
            train_sampling_strategy="sequential",
            precompute_ref_log_probs=case.reference == "cached",
            dataloader_pin_memory=False,
        )
        timer = Timer(steps)
        trainer = Trainer(
            model=model,
            ref_model=reference,
            args=config,
            train_dataset=data,
            processing_class=_tokenizer(),
            callbacks=[timer],
        )
        trainer.train()
    computed = zip(timer.losses_and_norms, trainer.scored, strict=True)
    steps_computed = [StepResult(loss, norm, scored) for (loss, norm), scored in computed]
    timer.clock.report(steps_computed, device_peak)


def _tokenizer():
    """The trainer reads its padding and end tokens alone."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


if __name__ == "__main__":
    main(read_case(sys.argv[1]), int(sys.argv[2]), "--checkpointing" in sys.argv)
