"""Anthropic HH with the DPO authors' settings (eric-mitchell/direct-preference-optimization).

    python scripts/train.py --config=configs/hh.py --workdir=runs/hh \\
        --config.model.path=FOLDER_OR_HUB_NAME

The data come from the hub. For files, name them and empty the splits, for both stages:

        --config.preference.data.source=train.jsonl.gz --config.preference.data.split= \\
        --config.preference.data.eval_source=test.jsonl.gz --config.preference.data.eval_split=

The model is theirs, Pythia 2.8B: 31 GiB of float32 weights, gradients and RMSprop moments, which
mesh.fsdp spreads over all devices (docs/plans.md says over which). A smaller one for one device is
--config.model.path=openai-community/gpt2-large (774M parameters). RMSprop, one epoch of SFT on the
chosen responses and one of DPO, batch 64, 150 warm-up steps, gradients clipped at norm 10. One
epoch of all 160,800 pairs is 2,513 steps a stage. Departures: SFT is a mean over tokens (theirs is
a sum per sequence), and a pair that is still too long once its prompt is cut is dropped (theirs
loses the end of its responses).

Memory of a chip, and time of SFT and DPO at the roofline, from a compiled plan (docs/plans.md):

    h100:8: 7.5 GiB, 0.32 h, 2.5 chip-hours

The first command compiles the plan, for other chips as well (v5e:4x4, with
--config.max_buckets=1); the second one makes a Slurm job:

    python scripts/plan.py --config=configs/hh.py --topology=h100:8
    python scripts/launch.py slurm --config=configs/hh.py --workdir=runs/hh --nodes=1 \\
        --gpus_per_node=8 --time=24:00:00

The win rates of the paper's figure 3, from one command:

    python scripts/recipe.py --config=configs/hh.py:small --workdir=runs/hh_small \\
        --config.recipe.data=FOLDER
    python scripts/recipe.py --config=configs/hh.py:paper --workdir=runs/hh_paper \\
        --config.recipe.judge=openai:MODEL@URL

Preferred-FT (SFT on the chosen responses), DPO and the best of 128 responses of Preferred-FT are
compared with the chosen response, over temperatures and over training steps; zero-shot and few-shot
prompting of the model before them. `paper`, the default, has the settings above.

`small` is for 2 CPU cores. FOLDER holds stories260k, a Llama of 0.26M parameters that knows
children's stories, and hh-rlhf/helpful-single-turn/{train_gt,test}.jsonl.gz. Its vocabulary of 512
ids makes long texts: pairs of more than 384 tokens (one in seven) are left out of training, prompts
of more than 40 words, or with a chosen response of more than 80, out of the test. Responses end at
96 tokens, where more than half of the chosen responses go on. The judge is a reward model, trained
on pairs of other prompts.
"""

from ml_collections.config_dict import FieldReference

from dpojax.config.defaults import default_config

SHOWS = """A small run shows that every step of the experiment works, and how sure its numbers are.
It does not show which method is more helpful: a model of 0.26M parameters answers no question, and
the judge, which has as many, hardly knows the better of two answers (its accuracy on held-out pairs
is in the table of training runs)."""


def get_config(variant="paper"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/hh.py:{variant}: one of {', '.join(VARIANTS)}")
    config = default_config()
    config.preference.beta = 0.1
    config.recipe.update(
        instruction="A conversation between a person and a helpful, honest assistant.",
        stop_text="\n\nHuman:",
        judge_template="helpful",
        best_of=128,
        checkpoints=4,
        temperatures=(0.25, 0.5, 0.75, 1.0),
    )
    VARIANTS[variant](config)
    return config


def _paper(config):
    config.model.path = "EleutherAI/pythia-2.8b"
    config.mesh.update(data=1, fsdp=-1)
    config.tokens.max_length = 512
    config.tokens.max_prompt_length = 256
    # The lengths are assumed, not measured.
    config.plan.update(examples=160_800, prompt=150.0, response=75.0)
    config.tokens.truncation = "cut_prompt_start"
    config.model.remat = "full"
    config.micro_rows = 16  # on all devices together: up to 16 share them
    for stage in (config.sft, config.preference):
        stage.data.source = "Anthropic/hh-rlhf"
        stage.data.split = "train"
        stage.data.form = "hh"
        stage.data.limit = 0
        stage.data.eval_source = "Anthropic/hh-rlhf"
        stage.data.eval_split = "test"
        stage.data.eval_limit = 256
    config.reward.data.update(limit=0, eval_limit=256)
    for stage in (config.sft, config.preference, config.reward):
        stage.batch_size = 64
        stage.learning_rate = 5e-7
        stage.warmup_steps = 150
        stage.optimizer.name = "rmsprop"
        stage.optimizer.clip_norm = 10.0
    config.reward.epochs = 1
    config.evaluate_every = 312  # their 20,000 examples
    config.checkpoint_every = 312
    config.recipe.update(
        comparisons="Anthropic/hh-rlhf",
        comparisons_split="train",
        tests="Anthropic/hh-rlhf",
        tests_split="test",
        test_share=0.01,
        test_prompts=256,
        max_words=180,
        max_new_tokens=256,
        judge="openai:gpt-4-0314@https://api.openai.com/v1",
    )


def _small(config):
    config.max_buckets = 2  # another would take longer to compile than it saves this model
    data = FieldReference("")
    config.recipe.data = data
    config.recipe.update(
        comparisons=data + "/hh-rlhf/helpful-single-turn/train_gt.jsonl.gz",
        tests=data + "/hh-rlhf/helpful-single-turn/test.jsonl.gz",
        test_share=0.05,
        judge_share=0.4,
        test_prompts=100,
        max_words=40,
        max_reference_words=80,
        max_new_tokens=96,
    )
    config.model.path = data + "/stories260k"
    config.tokens.max_length = 384
    for stage in (config.sft, config.preference, config.reward):
        stage.data.update(limit=0, eval_limit=200)
        stage.update(batch_size=32, schedule="cosine")
    config.sft.update(epochs=3, learning_rate=2e-3)
    config.preference.update(epochs=1, learning_rate=3e-4)
    config.reward.update(epochs=2, learning_rate=5e-4)
    config.log_every, config.evaluate_every, config.checkpoint_every = 5, 10, 10


VARIANTS = {"paper": _paper, "small": _small}


def recipe(config):
    from dpojax.recipes import recipe as r

    settings = config.recipe
    preferred = r.Side("Preferred-FT", r.SFT, best_of=(1, settings.best_of))
    sides = [*r.prompted_sides(config), preferred, *r.dpo_sides(config)]
    evaluations = [r.Evaluation("temperatures", "Over temperatures", sides, settings.temperatures)]
    if settings.checkpoints:
        steps = r.checkpoint_sides(config, [preferred, *r.dpo_sides(config)])
        evaluations.append(r.Evaluation("steps", "Over training steps", steps, (1.0,)))
    shows = SHOWS if settings.judge == r.TRAINED else ""
    title = "HH: win rate against the chosen response"
    trainings = r.usual_trainings(config)
    if settings.checkpoints:  # those in the middle of a run have to stay
        trainings = [t._replace(changes={**t.changes, "max_checkpoints": 100}) for t in trainings]
    return r.Recipe(title, trainings, evaluations, shows)


def sweep():
    """beta as in the paper's frontier."""
    return [{"preference.beta": beta} for beta in (0.05, 0.1, 1.0, 5.0)]
