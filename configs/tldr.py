"""Summaries of Reddit posts: the DPO paper's figures 2 (right) and table 1, from one command.

    python scripts/recipe.py --config=configs/tldr.py:small --workdir=runs/tldr \\
        --config.recipe.data=FOLDER
    python scripts/recipe.py --config=configs/tldr.py:paper --workdir=runs/tldr_paper \\
        --config.recipe.judge=openai:MODEL@URL

SFT on reference summaries, DPO with beta 0.5 on human comparisons, PPO with a learned reward, and
the best of 128 responses of the SFT policy, each at temperatures 0 to 1; zero-shot and few-shot
prompting of the model before SFT. The judge compares each response with the reference summary. Then
the same policies summarise news (CNN/DailyMail) at temperatures 0 and 0.25. --dry_run prints the
plan.

`paper`, the default, is the protocol of Rafailov et al. 2023, sections 6.2 and 6.3: RMSprop at 1e-6
with 150 warm-up steps, batches of 64, one epoch. Departures: the model is Pythia 2.8B (theirs is
GPT-J with a public SFT policy), and the judge is whichever you name (theirs was GPT-4). Float32
weights, gradients and moments of 2.8B parameters are 31 GiB a training run, and PPO holds a policy
and a value model: mesh.fsdp spreads them over all devices. SFT and DPO alone, with the same
settings:

    python scripts/train.py --config=configs/tldr.py --workdir=runs/tldr_sft

Memory of a chip, and time of SFT and DPO at the roofline, from a compiled plan (docs/plans.md):

    h100:8: 7.5 GiB, 0.21 h, 1.7 chip-hours

The first command compiles the plan, for other chips as well (v5e:4x4, with
--config.max_buckets=1); the second one makes a Slurm job:

    python scripts/plan.py --config=configs/tldr.py --topology=h100:8
    python scripts/launch.py slurm --config=configs/tldr.py --workdir=runs/tldr_sft --nodes=1 \\
        --gpus_per_node=8 --time=24:00:00

`small` is for 2 CPU cores. FOLDER holds summarize-from-feedback/comparisons/*.json.gz (Stiennon et
al. 2020), imdb/train.parquet and cnn-dailymail/*.jsonl.gz. A new model of 1.7M parameters with a
byte-level BPE of 4,096 ids, made here, learns English from film reviews, and then to summarise from
a few hundred posts. No post is cut: those that have more than 640 tokens with their summary are
left out of training, posts and articles of more than 400 words out of the test. Most posts come
without the summary that their author wrote: there the better of two model summaries takes its
place. The judge is a reward model, trained on comparisons of other posts.
"""

from ml_collections.config_dict import FieldReference

from dpojax.config.defaults import default_config

SHOWS = """A small run shows that every step of the experiment works, and how sure its numbers are.
It does not show which method summarises better: a model of 1.7M parameters does not summarise."""


def get_config(variant="paper"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/tldr.py:{variant}: one of {', '.join(VARIANTS)}")
    config = default_config()
    config.tokens.max_length = 512
    config.preference.beta = 0.5
    config.recipe.update(
        betas=(0.5,),
        best_of=128,
        temperatures=(0.0, 0.25, 0.5, 0.75, 1.0),
        shifted_temperatures=(0.0, 0.25),
        instruction="Each post below ends with a summary of it in one or two sentences.\n\n",
        stop_text="\n\n",
        judge_template="concise",
    )
    for stage in (config.sft, config.preference, config.reward):
        stage.data.update(limit=0, eval_limit=256)
    VARIANTS[variant](config)
    return config


def _small(config):
    config.max_buckets = 2  # another would take longer to compile than it saves this model
    data = FieldReference("")
    config.recipe.data = data
    config.recipe.update(
        comparisons=data + "/summarize-from-feedback/comparisons/*.json.gz",
        texts=data + "/imdb/train.parquet",
        shifted=data + "/cnn-dailymail/*.jsonl.gz",
        test_share=0.15,
        judge_share=0.35,
        test_prompts=100,
        max_words=400,
        shots=1,
        max_new_tokens=56,
    )
    config.tokenizer = "train:4096"
    config.tokens.max_length = 640
    config.model.update(width=128, layers=4, heads=4, kv_heads=2, mlp_width=320, max_positions=1280)
    config.sft.update(epochs=4, batch_size=16, learning_rate=1e-3, schedule="cosine")
    config.sft.score_prompt = True  # posts are most of the English that it reads
    config.preference.update(batch_size=16, learning_rate=1e-4, schedule="cosine")
    config.reward.update(batch_size=16, learning_rate=2e-4, epochs=2, schedule="cosine")
    config.ppo.update(batch_size=32, limit=0, steps=16, max_new_tokens=56, minibatches=4)
    config.ppo.learning_rate = 3e-4
    config.samples.update(count=32, per_prompt=2, max_new_tokens=56)
    config.log_every, config.evaluate_every, config.checkpoint_every = 5, 20, 0


def _paper(config):
    config.model.update(path="EleutherAI/pythia-2.8b", remat="full")
    config.mesh.update(data=1, fsdp=-1)
    # The lengths are assumed, not measured.
    config.plan.update(examples=92_858, prompt=330.0, response=40.0)
    config.micro_rows = 16  # on all devices together: up to 16 share them
    config.recipe.update(
        comparisons="openai/summarize_from_feedback:comparisons@refs/convert/parquet",
        comparisons_split="train",
        demonstrations="trl-lib/tldr",
        demonstrations_split="train",
        tests="trl-lib/tldr",
        tests_split="test",
        shifted="abisee/cnn_dailymail:3.0.0",
        shifted_split="test",
        test_share=0.02,
        test_prompts=256,
        shifted_prompts=256,
        max_words=360,
        shots=2,
        max_new_tokens=80,
        judge="openai:gpt-4-0314@https://api.openai.com/v1",
    )
    for name in ("sft", "preference"):
        data = config[name].data
        data.source = "trl-lib/tldr" if name == "sft" else config.recipe.comparisons
        data.split = "train"
    for stage in (config.sft, config.reward, config.preference, config.ppo):
        stage.update(batch_size=64, learning_rate=1e-6, warmup_steps=150)
        stage.optimizer.name = "rmsprop"
    config.reward.epochs = 1
    config.ppo.update(limit=25_000, max_new_tokens=80, steps=400, value_learning_rate=1e-5)
    config.samples.update(count=256, per_prompt=1, max_new_tokens=80)
    config.log_every, config.evaluate_every, config.checkpoint_every = 10, 300, 300


VARIANTS = {"small": _small, "paper": _paper}


def recipe(config):
    from dpojax.recipes import recipe as r

    settings = config.recipe
    trained = [
        r.Side("SFT", r.SFT, best_of=(1, settings.best_of)),
        *r.dpo_sides(config),
        r.Side("PPO", r.PPO),
    ]
    sides = [*r.prompted_sides(config), *trained]
    evaluations = [r.Evaluation("tldr", "Posts (TL;DR)", sides, settings.temperatures)]
    if settings.shifted:
        title, news = "News (CNN/DailyMail)", settings.shifted_temperatures
        evaluations.append(r.Evaluation("news", title, trained, news, r.SHIFTED))
    shows = SHOWS if not config.model.path else ""
    trainings = _quick_base(r.usual_trainings(config, ppo=True))
    return r.Recipe(
        "TL;DR: win rate against the reference summaries", trainings, evaluations, shows
    )


def _quick_base(trainings):
    """The new model of `small` reads the beginnings of a part of the reviews."""
    changes = {
        "sft.data.limit": 4_000,
        "sft.epochs": 1,
        "sft.batch_size": 32,
        "sft.learning_rate": 3e-3,
        "tokens.truncation": "cut_response_end",
    }
    return [t._replace(changes=changes) if t.name == "base" else t for t in trainings]


def sweep():
    """beta around the paper's 0.5."""
    return [{"preference.beta": beta} for beta in (0.1, 0.5, 1.0)]
