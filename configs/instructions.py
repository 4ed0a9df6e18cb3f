"""SFT, then DPO, on the 1,100 instruction preferences of Raschka 2024 (polite against rude).

    python scripts/train.py --config=configs/instructions.py --workdir=runs/instructions \\
        --config.sft.data.source=instruction-data-with-preference.json \\
        --config.preference.data.source=instruction-data-with-preference.json

The model is GPT-2 medium from the hub (355M parameters: 4.3 GB of float32 weights and AdamW
moments, besides gradients and activations); `--config.model.path=FOLDER` takes a model of
any family of the README. SFT is on the chosen responses.

The study of beta on these data, from one command: DPO with beta 0.1, 0.3, 0.7 and 1.0, loss and KL
per token by epoch, and the win rate of SFT and of DPO by temperature. The judge is SBERT: the
response wins whose embedding is nearer to that of the chosen response. It is asked twice: against
other responses of SFT, drawn at the same temperature, and against the rejected responses.

    python scripts/recipe.py --config=configs/instructions.py:small --workdir=runs/study_small \\
        --config.recipe.data=FOLDER --config.recipe.judge=sbert:MINILM
    python scripts/recipe.py --config=configs/instructions.py:paper --workdir=runs/study \\
        --config.recipe.comparisons=instruction-data-with-preference.json

`paper`, the default, has the settings above, and all-MiniLM-L6-v2 from the hub. `small` is for 2
CPU cores: FOLDER holds stories260k, a Llama of 0.26M parameters that knows children's stories, and
instruction-preference/instruction-data-with-preference.json; MINILM is a folder of a sentence
encoder. All rows fit into its 512 tokens; responses end at 80 tokens.
"""

from ml_collections.config_dict import FieldReference

from dpojax.config.defaults import default_config

SHOWS = """SBERT measures how near a response is to the chosen one, not how good it is. A small run
shows how loss and KL depend on beta, and how sure the win rates are. It does not show that DPO
follows instructions better: a model of 0.26M parameters follows none."""


def get_config(variant="paper"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/instructions.py:{variant}: one of {', '.join(VARIANTS)}")
    config = default_config()
    config.tokens.max_length = 512
    for stage in (config.sft, config.preference):
        stage.data.source = ""  # the file: say where it is
        stage.data.limit = 0
        stage.data.eval_limit = 0
        stage.data.form = "instruction"
        stage.batch_size = 8
        stage.schedule = "cosine"
    config.sft.epochs = 2
    config.evaluate_every = 25
    config.recipe.update(
        betas=(0.1, 0.3, 0.7, 1.0),
        best_of=1,
        shots=0,
        temperatures=(0.0, 0.25, 0.5, 0.75, 1.0),
        test_share=0.1,
        judge="sbert:sentence-transformers/all-MiniLM-L6-v2",
        max_new_tokens=128,
    )
    VARIANTS[variant](config)
    return config


def _paper(config):
    config.model.path = "openai-community/gpt2-medium"
    # The lengths are assumed, not measured.
    config.plan.update(examples=990, prompt=55.0, response=30.0)
    config.micro_rows = 2
    config.sft.learning_rate = 5e-5
    config.preference.learning_rate = 5e-6


def _small(config):
    config.max_buckets = 2  # another would take longer to compile than it saves this model
    data = FieldReference("")
    config.recipe.data = data
    config.recipe.comparisons = (
        data + "/instruction-preference/instruction-data-with-preference.json"
    )
    config.model.path = data + "/stories260k"
    config.recipe.max_new_tokens = 80
    config.sft.update(batch_size=32, epochs=6, learning_rate=2e-3)
    config.preference.update(batch_size=32, epochs=3, learning_rate=1e-4)
    config.log_every, config.evaluate_every, config.checkpoint_every = 5, 6, 0


VARIANTS = {"paper": _paper, "small": _small}


def recipe(config):
    from dpojax.recipes import recipe as r

    trainings, sides = r.usual_trainings(config), [r.Side("SFT", r.SFT), *r.dpo_sides(config)]
    curves = [r.dpo_name(beta) for beta in config.recipe.betas]
    temperatures = config.recipe.temperatures
    evaluations = [
        r.Evaluation("sft", "Against SFT", sides, temperatures, against=r.SFT),
        r.Evaluation("rejected", "Against the rejected", sides, temperatures, against=r.REJECTED),
    ]
    title = "Instruction preferences: DPO by beta"
    shows = SHOWS if config.recipe.data else ""
    return r.Recipe(title, trainings, evaluations, shows, curves)


def sweep():
    """The values of beta that the data set's author discusses."""
    return [{"preference.beta": beta} for beta in (0.1, 0.3, 0.7, 1.0)]
