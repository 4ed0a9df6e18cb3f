"""SFT on the chosen responses, then DPO, on pairs of your own: a file, a folder, or a hub name.

    python scripts/train.py --config=configs/pairs.py:tiny --workdir=runs/first \\
        --config.preference.data.source=pairs.jsonl
    python scripts/train.py --config=configs/pairs.py --workdir=runs/mine \\
        --config.model.path=FOLDER_OR_HUB_NAME --config.preference.data.source=pairs.jsonl
    python scripts/sweep.py --config=configs/pairs.py --workdir=runs/betas \\
        --config.model.path=FOLDER_OR_HUB_NAME --config.preference.data.source=pairs.jsonl

Any form of data that is found by its keys (docs/data.md); both stages read the same source, and
hold out the same prompts. `tiny` needs no model and no network: a Llama-shaped model of 1.0M
parameters with a byte-level BPE of 2,048 ids, both made here, learns from at most 4,000 pairs, in
minutes on two CPU cores. It shows that your data are read as you mean them, and what the figures
look like; it writes no good text. `start`, the default, is for a checkpoint: GPT-2 (124M
parameters), unless model.path names another. The batch and the rates are where most people begin;
sweep() has four values of beta.
"""

from ml_collections.config_dict import FieldReference

from dpojax.config.defaults import default_config


def get_config(variant="start"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/pairs.py:{variant}: one of {', '.join(VARIANTS)}")
    config = default_config()
    source = FieldReference("")  # one value: set in one place, it is set in all
    for stage in (config.sft, config.preference):
        stage.data.update(source=source, form="auto", limit=0, eval_limit=500)
        stage.schedule = "cosine"
        stage.warmup_ratio = 0.1
    config.preference.beta = 0.1
    # A pair that is too long loses the start of its prompt, never the end of an answer.
    config.tokens.update(max_length=512, truncation="cut_prompt_start")
    VARIANTS[variant](config)
    return config


def _start(config):
    config.model.path = "openai-community/gpt2"
    config.sft.update(batch_size=32, learning_rate=2e-5)
    config.preference.update(batch_size=32, learning_rate=1e-6)
    config.evaluate_every = 50


def _tiny(config):
    config.model.update(width=128, layers=2, heads=4, kv_heads=4, mlp_width=384, max_positions=512)
    config.tokenizer = "train:2048"
    config.max_buckets = 2  # another would take longer to compile than it saves this model
    for stage in (config.sft, config.preference):
        stage.data.update(limit=4_000, eval_limit=200)
        stage.batch_size = 32
    config.sft.update(epochs=3, learning_rate=3e-3)
    config.preference.update(epochs=1, learning_rate=3e-4)
    config.log_every, config.evaluate_every = 5, 15


VARIANTS = {"start": _start, "tiny": _tiny}


def sweep():
    return [{"preference.beta": beta} for beta in (0.03, 0.1, 0.3, 1.0)]
