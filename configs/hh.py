"""Anthropic HH with the DPO authors' settings (eric-mitchell/direct-preference-optimization).

    python scripts/train.py --config=configs/hh.py --workdir=runs/hh \\
        --config.model.path=FOLDER_OR_HUB_NAME

The data come from the hub. For files, name them and empty the splits, for both stages:

        --config.preference.data.source=train.jsonl.gz --config.preference.data.split= \\
        --config.preference.data.eval_source=test.jsonl.gz --config.preference.data.eval_split=

Their model is Pythia 2.8B, which runs, too, as any family of the README does. The default is GPT-2
large (774M parameters, 6.2 GB of float32 weights and RMSprop moments, besides gradients and
activations of two rows of 1,300 tokens at a time). RMSprop, one epoch of SFT on the chosen
responses and one of DPO, batch 64, 150 warm-up steps, gradients clipped at norm 10. One epoch of
all 160,800 pairs is 2,513 steps a stage. Departures: SFT is a mean over tokens (theirs is a sum per
sequence), and a pair that is still too long once its prompt is cut is dropped (theirs loses the end
of its responses).
"""

from dpojax.config.defaults import default_config


def get_config():
    config = default_config()
    config.model.path = "openai-community/gpt2-large"
    config.tokens.max_length = 512
    config.tokens.max_prompt_length = 256
    config.tokens.truncation = "cut_prompt_start"
    config.model.remat = "full"
    config.micro_rows = 2
    for stage in (config.sft, config.preference):
        stage.data.source = "Anthropic/hh-rlhf"
        stage.data.split = "train"
        stage.data.form = "hh"
        stage.data.limit = 0
        stage.data.eval_source = "Anthropic/hh-rlhf"
        stage.data.eval_split = "test"
        stage.data.eval_limit = 256
        stage.batch_size = 64
        stage.learning_rate = 5e-7
        stage.warmup_steps = 150
        stage.optimizer.name = "rmsprop"
        stage.optimizer.clip_norm = 10.0
    config.preference.beta = 0.1
    config.evaluate_every = 312  # their 20,000 examples
    config.checkpoint_every = 312
    return config


def sweep():
    """beta as in the paper's frontier."""
    return [{"preference.beta": beta} for beta in (0.05, 0.1, 1.0, 5.0)]
