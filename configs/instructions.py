"""SFT, then DPO, on the 1,100 instruction preferences of Raschka 2024 (polite against rude).

    python scripts/train.py --config=configs/instructions.py --workdir=runs/instructions \\
        --config.sft.data.source=instruction-data-with-preference.json \\
        --config.preference.data.source=instruction-data-with-preference.json

The model is GPT-2 medium from the hub (355M parameters: 4.3 GB of float32 weights and AdamW
moments, besides gradients and activations); `--config.model.path=FOLDER` takes a model of
any family of the README. SFT is on the chosen responses.
"""

from dpojax.config.defaults import default_config


def get_config():
    config = default_config()
    config.model.path = "openai-community/gpt2-medium"
    config.tokens.max_length = 512
    config.micro_rows = 2
    for stage in (config.sft, config.preference):
        stage.data.source = ""  # the file: say where it is
        stage.data.limit = 0
        stage.data.eval_limit = 0
        stage.data.form = "instruction"
        stage.batch_size = 8
        stage.schedule = "cosine"
    config.sft.epochs = 2
    config.sft.learning_rate = 5e-5
    config.preference.learning_rate = 5e-6
    config.evaluate_every = 25
    return config


def sweep():
    """The values of beta that the data set's author discusses."""
    return [{"preference.beta": beta} for beta in (0.1, 0.3, 0.7, 1.0)]
