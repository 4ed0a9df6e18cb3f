"""IMDb reviews, continued from their first tokens towards positive ones: the DPO paper's figure 2.

    python scripts/frontier.py --config=configs/imdb.py --workdir=runs/imdb
    python scripts/frontier.py --config=configs/imdb.py:paper --workdir=runs/imdb_paper

The reviews come from the hub. For a folder with train.parquet and test.parquet (columns text and
label) add --config.sft.data.source=FOLDER, which holds for prompts and labels as well. --dry_run
builds every program from shapes, without weights or data. The SFT stage alone:

    python scripts/train.py --config=configs/imdb.py --workdir=runs/imdb_sft

`small`, the default, is for 2 CPU cores: a Llama-shaped model of 1.9M parameters, new, with a
byte-level BPE of 4,096 ids made from the reviews. SFT reads the first 64 tokens of all 25,000
training reviews, the sentiment classifier, which starts from the SFT policy and is the true reward,
their first 96 tokens; 4,000 prefixes of 2 to 8 tokens with 4 completions of 40 tokens, ranked; then
the 22 runs.

`paper` is the protocol of Rafailov et al. 2023, appendix C.1: GPT-2 large, 25,000 prefixes with 4
completions, all 6 pairs of each labelled by siebert/sentiment-roberta-large-english, RMSprop at
1e-6 with 150 warm-up steps, batches of 64, SFT for one epoch, a reward model for three. Weights,
gradients and moments are 8.7 GiB in float32; PPO holds a policy and a value model. Departures: the
paper does not say how long its completions are, here they have 48 tokens each; SFT reads all
training reviews, cut at 256 tokens; a tenth of them gives no prefix (`prefixes:` holds it out), and
policies are judged on prefixes of test reviews.

`paper` is for one H200. The first command says memory and hours of a run of DPO (docs/plans.md),
the second one those of the whole frontier, and compiles every program for that:

    python scripts/plan.py --config=configs/imdb.py:paper --config.stages=preference \\
        --topology=h200:1
    python scripts/frontier.py --config=configs/imdb.py:paper --dry_run --topology=h200:1

Memory of the chip, and time of a run of DPO at the roofline:

    h200:1: 12.4 GiB, 0.11 h, 0.1 chip-hours
"""

from ml_collections.config_dict import FieldReference

from dpojax.config.defaults import default_config


def get_config(variant="small"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/imdb.py:{variant}: one of {', '.join(VARIANTS)}")
    config = default_config()
    config.stages = ("sft",)
    source = FieldReference("stanfordnlp/imdb")  # one value: set in one place, it is set in all
    for data in (config.sft.data, config.classifier.data):
        data.source = data.eval_source = source
        data.split, data.eval_split = "train", "test"
        data.limit, data.eval_limit = 0, 1_000
    config.sft.data.form = "text"
    config.frontier.prompts = config.ppo.prompts = "prefixes:" + source + "@train"
    config.samples.prompts = "prefixes:" + source + "@test"
    # Completions have a fixed length: no text ends, and what was cut is kept.
    config.tokens.truncation = "cut_response_end"
    config.tokens.append_eos = False
    config.frontier.truncated = "keep"
    for stage in (config.preference, config.reward):
        stage.data.limit = 0
    config.checkpoint_every = 0
    VARIANTS[variant](config)
    return config


def _small(config):
    config.tokenizer = "train:4096"
    config.model.update(max_positions=128)
    config.tokens.max_length = 64
    config.sft.update(epochs=1, learning_rate=3e-3, warmup_steps=50, schedule="cosine")
    config.classifier.update(max_tokens=96, first_token=8, epochs=1, schedule="cosine")
    config.classifier.learning_rate = 1e-3
    config.frontier.update(reward="classifier", count=4_000, completions=4)
    config.samples.update(count=64, per_prompt=8, max_new_tokens=40)
    config.preference.update(batch_size=32, learning_rate=3e-4, warmup_steps=30, schedule="cosine")
    config.preference.data.eval_limit = 100
    config.reward.update(batch_size=32, learning_rate=3e-4, schedule="cosine")
    config.reward.data.eval_limit = 200
    config.ppo.update(batch_size=64, limit=4_000, steps=60, max_new_tokens=40, minibatches=4)
    config.ppo.learning_rate = 5e-4
    config.log_every, config.evaluate_every = 5, 40


def _paper(config):
    config.model.path = "openai-community/gpt2-large"
    config.model.remat = "full"
    config.micro_rows = 8
    config.plan.update(examples=150_000, prompt=5.0, response=48.0)
    config.tokens.max_length = 256
    config.frontier.update(count=25_000, completions=4, pairs="all")
    config.frontier.reward = "classifier:siebert/sentiment-roberta-large-english"
    config.samples.update(count=256, per_prompt=4, max_new_tokens=48)
    config.reward.epochs = 3
    config.ppo.update(batch_size=64, limit=25_000, max_new_tokens=48, steps=400)
    config.ppo.value_learning_rate = 1e-5
    for stage in (config.sft, config.reward, config.preference, config.ppo):
        stage.update(batch_size=64, learning_rate=1e-6, warmup_steps=150)
        stage.optimizer.name = "rmsprop"
    config.log_every, config.evaluate_every, config.checkpoint_every = 10, 300, 300


VARIANTS = {"small": _small, "paper": _paper}


def frontier(config):
    """The 22 runs of the paper's figure 2; with a model.path, all with the same settings."""
    from dpojax.frontier.runs import paper_runs

    if config.model.path:  # step sizes and KL coefficients below are those of the small model
        return paper_runs()
    # The learned reward is in logits, which spread several times as wide as a probability.
    of_method = {
        "ppo": {"evaluate_every": 15, "ppo.kl_coefficient": 0.3},
        "ppo_gt": {"evaluate_every": 15, "ppo.kl_coefficient": 0.1},
    }
    # The smaller beta is, the less but the size of the steps holds the policy back.
    rates = {
        "beta=0.05": {"preference.learning_rate": 2e-4},
        "beta=0.1": {"preference.learning_rate": 2e-4},
    }
    runs = []
    for run in paper_runs():
        changes = of_method.get(run.method, {}) | rates.get(run.setting, {})
        runs.append(run._replace(changes={**run.changes, **changes}))
    return runs
