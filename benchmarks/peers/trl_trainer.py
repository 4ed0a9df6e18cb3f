"""TRL's DPOTrainer: python trl_trainer.py CASE STEPS [--checkpointing]"""

from __future__ import annotations

import copy
import os
import sys
import tempfile

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
import transformers
import trl
from cases import BETA, CLIP, LEARNING_RATE, SPECIAL, WARM, Case, Clock, batches, read_case
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch_models import build


class Timer(transformers.TrainerCallback):
    """From the end of a step to the end of the next; collating counts, which takes milliseconds."""

    def __init__(self, steps: int):
        self.clock, self.left = Clock(), WARM + steps

    def on_train_begin(self, args, state, control, **more):
        self.clock.start()

    def on_step_end(self, args, state, control, **more):
        self.clock.stop()
        self.left -= 1
        control.should_training_stop = self.left == 0
        self.clock.start()


def main(case: Case, steps: int, checkpointing: bool) -> None:
    model = build(case)
    reference = copy.deepcopy(model) if case.reference == "live" else None
    text = lambda ids: " ".join("</s>" if i == 1 else f"t{i}" for i in ids)
    pairs = [pair for batch in batches(case, WARM + steps) for pair in batch]
    data = Dataset.from_dict(
        {
            "prompt": [text(pair.prompt) for pair in pairs],
            "chosen": [f" {text(pair.chosen[:-1])}" for pair in pairs],  # it adds the end itself
            "rejected": [f" {text(pair.rejected[:-1])}" for pair in pairs],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=case.pairs,
            max_length=1024,
            gradient_checkpointing=checkpointing,
            bf16=case.dtype == "bfloat16",
            use_cpu=True,
            report_to=[],
            logging_steps=10**6,
            save_strategy="no",
            learning_rate=LEARNING_RATE,
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
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=reference,
            args=config,
            train_dataset=data,
            processing_class=_tokenizer(case),
            callbacks=[timer],
        )
        first = trainer.train_dataset[0]
        assert [len(first[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")] == [
            len(ids) for ids in pairs[0]
        ]
        trainer.train()
    versions = f"trl {trl.__version__}, torch {torch.__version__}"
    timer.clock.report(versions=f"{versions}, transformers {transformers.__version__}")


def _tokenizer(case: Case):
    words = ["<pad>", "</s>", "<unk>", "<x>", *(f"t{i}" for i in range(SPECIAL, case.vocabulary))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


if __name__ == "__main__":
    main(read_case(sys.argv[1]), int(sys.argv[2]), "--checkpointing" in sys.argv)
