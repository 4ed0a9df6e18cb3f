"""A run of SFT and DPO that takes a few seconds once it is compiled, and changes many files."""

from dpojax.config.defaults import default_config


def get_config():
    config = default_config()
    config.model.update(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16, max_positions=128)
    config.tokens.max_length = 96
    for stage, steps in ((config.sft, 4), (config.preference, 6)):
        stage.data.update(limit=30, eval_limit=5)
        stage.update(batch_size=4, steps=steps, warmup_steps=1, learning_rate=3e-3)
    config.samples.update(reward="reviews", count=4, per_prompt=2, max_new_tokens=8)
    config.model.remat, config.micro_rows, config.max_buckets = "none", 4, 1  # less to trace
    config.log_every, config.evaluate_every, config.checkpoint_every = 2, 3, 1
    config.trackers = ()
    return config


def sweep():
    return [{"preference.beta": 0.1}, {"preference.beta": 0.5}, {"preference.batch_size": 2}]
