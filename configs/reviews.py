"""The embedded task: short film reviews, towards positive ones. No download, no accelerator.

    python scripts/frontier.py --config=configs/reviews.py --workdir=runs/frontier
    python scripts/train.py --config=configs/reviews.py --workdir=runs/reviews

The first makes the reward-KL frontier, 22 runs, in about half an hour of one core; the second SFT
and then DPO on pairs of the grammar's own, in 2 minutes on two. A Llama-shaped model of 0.9M
parameters, made here.
"""

from dpojax.launch.defaults import default_config


def get_config():
    config = default_config()
    config.tokens.max_length = 96
    config.sft.data.limit = 16_000
    config.sft.schedule = "cosine"
    config.dpo.data.limit = 8_000
    config.dpo.epochs = 2
    config.dpo.learning_rate = 5e-4
    config.dpo.schedule = "cosine"
    config.evaluate_every = 25
    config.reward.schedule = "cosine"
    config.reward.data.limit = 3_000
    config.ppo.update(steps=25, learning_rate=7e-4)
    config.frontier.update(count=5_000, pairs="best_worst")
    return config


def frontier(config):
    """The 22 runs of the paper's figure 2, on the best and the worst of four completions each.

    All six pairs of a prompt, as in the paper (frontier.pairs=ranked), cost twice the tokens;
    benchmarks/RESULTS.md has single runs of both. Unlikelihood and preferred-FT learn from 1,500
    prompts only, to save time: their points say what they reach in 44 steps.
    """
    from dpojax.launch.frontier import paper_runs

    common = {
        "dpo.batch_size": 32,
        "dpo.warmup_steps": 40,
        "dpo.epochs": 1,
        "dpo.data.limit": 0,
        "dpo.data.eval_limit": 200,
        "log_every": 10,
        "checkpoint_every": 0,
    }
    baseline = {"evaluate_every": 20, "dpo.data.limit": 1_500}
    own = {
        "dpo": {"evaluate_every": 40},
        # The learned reward is in logits, which spread several times as wide as the true one.
        "ppo": {"evaluate_every": 5, "ppo.kl_coefficient": 0.3},
        "ppo_gt": {"evaluate_every": 5, "ppo.kl_coefficient": 0.1},
        "unlikelihood": baseline,
        "preferred_ft": baseline,
    }
    # The smaller beta is, the less but the size of the steps holds the policy back.
    rates = {0.05: 2e-4, 0.1: 2e-4}
    rate = lambda run: {"dpo.learning_rate": rates.get(run.changes.get("dpo.beta"), 3e-4)}
    runs = paper_runs(common=common)
    return [run._replace(changes={**run.changes, **own[run.method], **rate(run)}) for run in runs]


def sweep():
    """The paper's values of beta (Rafailov et al. 2023, section 6.1)."""
    return [{"dpo.beta": beta} for beta in (0.05, 0.1, 1.0, 5.0)]
