"""DPO of Llama-3.1-8B-Instruct on UltraFeedback, and a sweep of four betas.

    python scripts/train.py --config=configs/llama8b.py --workdir=gs://BUCKET/llama8b
    python scripts/launch.py slurm --config=configs/llama8b.py --workdir=runs/llama8b --sweep \\
        --nodes=1 --gpus_per_node=8 --time=24:00:00
    python scripts/launch.py xpk --config=configs/llama8b.py --workdir=gs://BUCKET/llama8b \\
        --sweep --cluster=CLUSTER --tpu_type=v5litepod-64 --image=IMAGE

61,135 pairs of HuggingFaceH4/ultrafeedback_binarized, one epoch in batches of 128 (478 steps),
AdamW at 5e-7 with a cosine, warm-up in a tenth of the steps; texts up to 2,048 tokens, prompts up
to 1,024. Beta 0.1, and 0.01, 0.03 and 0.3 in sweep(). Products are in bfloat16; weights, gradients
and moments are float32, 16 bytes a parameter: 120 GiB, which mesh.fsdp spreads over all devices.
The reference is scored once, before training, and its log-probs are kept.

Memory of a chip and time at the roofline, from compiled plans (docs/plans.md):

    h200:8: 58.4 GiB, 0.14 h, 1.1 chip-hours
    v5e:4x8: 11.0 GiB, 0.23 h, 7.4 chip-hours (:v5e)
    v5p:2x2x2: 62.8 GiB, 0.35 h, 2.8 chip-hours (:v5p)

The variants h200 (the default), h100, v5e, v6e and v5p differ in rows of a micro-batch and in what
the backward pass computes again, and so in time and memory, but not in results.
"""

from dpojax.config.defaults import default_config


def get_config(variant="h200"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/llama8b.py:{variant}: one of {', '.join(VARIANTS)}")
    config = default_config()
    config.stages = ("preference",)
    config.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    config.model.compute_dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)
    config.tokens.update(max_length=2048, max_prompt_length=1024, truncation="cut_prompt_start")
    config.preference.data.update(
        source="HuggingFaceH4/ultrafeedback_binarized",
        split="train_prefs",
        eval_source="HuggingFaceH4/ultrafeedback_binarized",
        eval_split="test_prefs",
        limit=0,
        eval_limit=512,
    )
    config.preference.update(
        beta=0.1,
        epochs=1,
        batch_size=128,
        learning_rate=5e-7,
        schedule="cosine",
        warmup_ratio=0.1,
    )
    # The lengths are assumed, not measured.
    config.plan.update(examples=61_135, prompt=170.0, response=280.0)
    config.evaluate_every, config.checkpoint_every = 100, 100
    config.update_from_flattened_dict(VARIANTS[variant])
    return config


# How it is computed on each kind of chip, as compiled plans chose it; results do not depend on it.
# Large micro-batches gather the weights less often. A TPU's compiler takes minutes for each bucket.
VARIANTS = {
    "h200": {"micro_rows": 32, "model.remat": "dots"},
    "h100": {"micro_rows": 32, "model.remat": "full"},
    "v5e": {"micro_rows": 32, "model.remat": "full", "max_buckets": 2},
    "v6e": {"micro_rows": 32, "model.remat": "full", "max_buckets": 1},
    "v5p": {"micro_rows": 32, "model.remat": "dots", "max_buckets": 1},
}


def sweep():
    return [{"preference.beta": beta} for beta in (0.01, 0.03, 0.1, 0.3)]
