"""A frontier on the embedded task that two cores make in a minute and that conclusions follow from.

`test_frontier_conclusions.py` makes it with scripts/frontier.py.
"""

from dpojax.config.defaults import default_config
from dpojax.frontier.runs import Run


def get_config():
    config = default_config()
    config.model.update(width=64, layers=2, heads=2, kv_heads=2, mlp_width=192, max_positions=128)
    config.tokens.max_length = 96
    config.max_buckets = 1
    config.sft.data.update(limit=6_000, eval_limit=20)
    config.sft.schedule = "cosine"
    config.preference.data.update(limit=0, eval_limit=20)
    config.preference.batch_size = 32
    config.preference.steps = 60
    config.preference.warmup_steps = 10
    config.ppo.update(steps=14, batch_size=64, limit=512, kl_target=2.0, kl_horizon=128.0)
    config.ppo.max_new_tokens = 48
    config.log_every = 30
    config.evaluate_every = 30
    config.checkpoint_every = 0
    config.samples.update(count=32, per_prompt=8, max_new_tokens=48)
    config.frontier.update(count=800, reference_samples=256, best_of_n=(2, 4, 16, 64))
    config.trackers = ()
    return config


def frontier(config):
    return [
        Run("dpo", "beta=0.3", {"preference.beta": 0.3}),
        Run("dpo", "beta=1", {"preference.beta": 1.0}),
        Run("ppo_gt", "kl=2", {"evaluate_every": 14}, "ppo"),
        Run(
            "unlikelihood",
            "alpha=0.5",
            {"preference.loss": "unlikelihood", "preference.alpha": 0.5},
        ),
        Run("preferred_ft", "seed=0", {"preference.loss": "sft"}),
    ]
