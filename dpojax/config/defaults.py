"""Every key that a config can have, with what it means; the files in configs/ change a few."""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dpojax.stopping import STOPPED
from dpojax.watchdog import MINUTES


def default_config() -> ConfigDict:
    """The locked config: an unknown key or a value of another type is an error."""
    config = ConfigDict()
    config.seed = 0  # data order, and the initial weights of a model without a path
    config.stages = ("sft", "preference")  # in this order; each starts from the one before
    config.distributed = False  # several processes: call jax.distributed.initialize() first
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1 takes the devices that are left
    config.model = _model()
    # Folder or hub name. "" is the model's own, or the embedded task's. train:8192 makes one of
    # 8192 ids from the texts of sft.data.
    config.tokenizer = ""
    # A Jinja file for conversational data, or the name of one of the tokenizer's own templates. ""
    # is the tokenizer's own.
    config.chat_template = ""
    config.tokens = _tokens()
    # Folder of tokenised examples, which any number of runs may share. "" is inside the workdir.
    # Members of a sweep and runs of a frontier share one inside its workdir.
    config.token_cache = ""
    # Folder of compiled programs, which any number of runs may share, so that later ones start
    # sooner. "" is JAX_COMPILATION_CACHE_DIR, or, for a frontier, inside its workdir.
    config.compilation_cache = ""
    # Processes that tokenise; 0 is one for each core if there are many records. Where records are
    # plain texts, this process is one of them. Examples do not depend on it.
    config.num_proc = 0
    config.row_length = 0  # largest number of tokens in a row; 0 chooses it from the data
    # Largest number of rows of a micro-batch, on all devices together. A batch that has more is
    # computed in several (gradient accumulation), with the same gradient. 0 chooses a fast number.
    config.micro_rows = 0
    config.max_buckets = 4  # sizes at which micro-batches are compiled; more means less padding
    config.max_logits = 2**25  # float32 logits that a device holds at once (2**25 are 128 MiB)
    config.sft = _sft()
    config.preference = _preference()
    config.reward = _reward()
    config.classifier = _classifier()
    config.ppo = _ppo()
    config.samples = _samples()
    config.frontier = _frontier()
    config.recipe = _recipe()
    config.sweep = _sweep()
    config.plan = _plan()
    # allow_failed trains although the certificate in the workdir says that this mesh, precision or
    # set of XLA flags does not give the numbers of float32 (scripts/certify.py).
    config.numerics = ConfigDict(dict(allow_failed=False))
    # A run that makes no progress for so long is ended, and the stacks of its threads are printed.
    # It has to be longer than the longest compilation; 0 never ends a run.
    config.hang_minutes = MINUTES
    # The exit status of a run that was asked to stop (SIGTERM, Ctrl-C, SIGHUP): one for which the
    # cluster starts the job again. scripts/launch.py writes it into its files.
    config.exit_code_when_stopped = STOPPED
    config.check_memory = True  # refuse a stage that is predicted not to fit on a device
    config.profile = False  # trace, and tell where the time went; not for PPO or a sweep
    config.log_every = 10  # steps between lines of metrics; 0: only at the end
    config.evaluate_every = 100  # steps between evaluations; 0: only at the end
    config.checkpoint_every = 100  # steps between checkpoints; 0: only at the end
    config.max_checkpoints = 2  # how many checkpoints of a stage stay on disk
    config.trackers = ("tensorboard",)  # what plots metrics: tensorboard, wandb, trackio; or ()
    # Also write metrics under the names of these programs: trl, maxtext, or "trl,maxtext"
    # (docs/training.md). "" writes our own names alone.
    config.metric_names = ""
    return config.lock()


def _plan() -> ConfigDict:
    """The data that scripts/plan.py expects; they decide no result."""
    return ConfigDict(
        dict(
            examples=0,  # pairs, or texts of SFT, in one epoch
            prompt=0.0,  # tokens of a prompt, on average
            response=0.0,  # tokens of a response, on average
        )
    )


def _model() -> ConfigDict:
    return ConfigDict(
        dict(
            path="",  # Hugging Face folder or hub name; "" makes a new model of the shape below
            family="llama",  # llama or gpt2
            width=128,  # of the residual stream
            layers=4,  # blocks of attention and MLP
            heads=4,  # of attention
            kv_heads=4,  # heads of keys and values; fewer than `heads` is grouped attention
            mlp_width=384,  # of the layer inside of an MLP
            max_positions=256,  # longest row of tokens
            compute_dtype="float32",  # or bfloat16, of matrix products; weights stay float32
            # What a layer computes again in its backward pass: nothing (none), everything but
            # matrix products (dots), everything (full).
            remat="dots",
            # xla, or a kernel that stores no attention scores: splash (TPU), cudnn (NVIDIA GPU,
            # bfloat16), flash (NVIDIA GPU). auto takes the platform's kernel if it can do what the
            # model needs (on GPUs cudnn before flash), else xla.
            attention="auto",
        )
    )


def _tokens() -> ConfigDict:
    return ConfigDict(
        dict(
            max_length=512,  # prompt and one response together
            max_prompt_length=0,  # 0: only max_length counts
            truncation="drop",  # drop, cut_prompt_start, cut_response_end, error
            append_eos=True,  # after a response of plain text, so that the model learns to stop
            identical="drop",  # records whose responses are equal: drop, keep, error
            empty="drop",  # records with a response without text: drop, keep, error
            prompts_differ="drop",  # pairs whose dialogues have different prompts: drop, error
            malformed="drop",  # records that cannot be read or rendered: drop, error
            # Of a response with several turns of the assistant: score all of them, or the last.
            assistant_turns="all",
        )
    )


def _data(source: str, train: int, evaluation: int) -> ConfigDict:
    return ConfigDict(
        dict(
            # "reviews" (embedded), a file, a pattern, a folder, or a name on the Hugging Face hub:
            # NAME, NAME:SUBSET or NAME:SUBSET@REVISION. Commas separate several sources.
            source=source,
            # Of several sources: their shares of every batch, such as (2.0, 1.0). An epoch ends
            # with the source that is used up first. () mixes all records as one data set.
            weights=(),
            split="",  # of a hub name, a folder, or a JSON object of lists; or train[:1000]
            subset="",  # of a hub name or a folder that has named subsets
            revision="",  # branch, tag or commit of a hub name
            data_dir="",  # the folder inside of a hub name or folder
            # Where the file has the fields of a form, "prompt=question,chosen=answers[0].text":
            # our name = the file's. "-images" leaves a field out.
            columns="",
            # pair, hh, judged, instruction, ranked, unpaired, comparison, text, classified
            form="auto",
            # Use this many records of each source, and read no more; 0 is all. The embedded task
            # makes this many.
            limit=train,
            eval_source="",  # "" holds out a share of `source`, whole prompts at a time
            eval_split="",  # of eval_source; as `split`
            eval_share=0.1,  # share of the prompts that is held out
            eval_limit=evaluation,  # evaluate on this many held-out records of each source; 0: all
        )
    )


def _optimizer(learning_rate: float) -> dict:
    return dict(
        learning_rate=learning_rate,  # the highest of the schedule
        # Steps in which the rate rises from 0. Open: warmup_ratio, and without one 20 steps.
        warmup_steps=placeholder(int),
        warmup_ratio=placeholder(float),  # or this share of the steps, rounded up
        # constant, linear, cosine, or wsd: constant, then a line down at the end.
        schedule="constant",
        min_learning_rate_ratio=0.0,  # where linear, cosine and wsd end, as a share of the rate
        decay_share=0.1,  # wsd: the share of the steps in which the rate falls
        optimizer=ConfigDict(
            dict(
                name="adamw",  # adamw or rmsprop
                b1=0.9,  # adamw: decay of the mean gradient
                b2=0.999,  # adamw: decay of the mean squared gradient
                eps=1e-8,  # added to the root of the mean squared gradient
                rms_decay=0.99,  # rmsprop: decay of the mean squared gradient
                weight_decay=0.0,  # share of a weight taken away per step and learning rate
                clip_norm=1.0,  # the largest norm of a gradient; 0 is off
            )
        ),
        # A metric of the evaluations, such as "eval/loss". The stage's result is the checkpoint
        # where it was best, not the last one. "" keeps the last. Losses are best where they are
        # lowest; of a metric whose direction is not known, "+name" means that higher is better,
        # "-name" that lower is. Such members of a sweep train one after another.
        keep_best="",
        patience=0,  # stop after so many evaluations without a better one; 0: never
        # Stop at the first evaluation where a metric has reached a value, such as
        # "eval/samples/win_rate>=0.6" or "eval/loss<=0.5". Each member of a sweep stops for itself.
        stop_at="",
    )


def _lora() -> ConfigDict:
    return ConfigDict(
        dict(
            rank=0,  # of adapters over frozen weights; 0 is off, and trains all weights
            alpha=16.0,  # the product of an adapter's a and b is multiplied by alpha / rank
            targets=("attention/", "mlp/"),  # patterns found in paths such as blocks/mlp/up/kernel
            rank_stabilised=False,  # alpha / sqrt(rank) instead
            base_dtype="float32",  # of the frozen weights; bfloat16 halves them
            # A PEFT folder to start from. Its targets are taken; rank and scale must be equal.
            adapters="",
        )
    )


def _sft() -> ConfigDict:
    return ConfigDict(
        dict(
            data=_data("reviews", 12_000, 500),
            score_prompt=False,  # whether the prompt's tokens are trained on as well
            lora=_lora(),
            batch_size=64,  # examples of an optimiser step
            epochs=1,  # passes over the data
            steps=0,  # optimiser steps; 0: from epochs
            **_optimizer(3e-3),
        )
    )


def _options() -> dict:
    """The options of all losses.

    An option that is left open takes the loss's own default, if it has one. An option that the loss
    does not have is an error.
    """
    number = lambda: placeholder(float)
    return dict(
        beta=number(),  # how much the policy is kept near the reference; of most losses
        # The assumed share of wrong labels: of dpo, dpo_norm, robust, exo, aot, simpo, cpo, ...
        label_smoothing=number(),
        # The alpha of docs/losses.md: of unlikelihood, cpo, slic, tdpo, alphapo, odpo, tpo_l,
        # beta_dpo, alpha_dpo, uni_dpo.
        alpha=number(),
        # simpo, alphapo, tpo_l, simnpo, alpha_dpo: the target margin. uni_dpo: how much pairs that
        # are well apart are weighed down.
        gamma=number(),
        tau=number(),  # discopop: its temperature
        penalty=number(),  # dpop: weight of the penalty where chosen becomes less likely
        margin=number(),  # slic, uni_dpo: the target margin
        scale=number(),  # rpo, dpo_soft, uni_dpo, lambda_dpo: of the data's scores
        good_score=number(),  # uni_dpo: a chosen response is good from this score on
        epsilon=number(),  # epsilon_dpo: by how much logits are perturbed, and beta is changed
        momentum=number(),  # beta_dpo: of the mean gap over the batches
        retain_weight=number(),  # npo, simnpo: of the likelihood of responses to be kept
        value_beta=number(),  # astar_po: of the log-mean-exp of a prompt's scores
        max_reward=number(),  # chipo: margins are clipped at twice this
        threshold=number(),  # dpo_ties: the margin below which two responses tie
        desirable_weight=number(),  # kto: of examples that are desirable
        undesirable_weight=number(),  # kto: of examples that are not
        top=placeholder(int),  # plackett_luce: places that are ordered; all if open
        length_norm="",  # ipo: sum or mean; there is no default
        nll_norm="",  # likelihood terms (cpo, orpo, slic, sft, npo): sum or mean over tokens
        form="",  # rpo: sq, bwd_kl, fwd_kl
        convex="",  # gpo: logistic, hinge, squared, exponential, truncated_quadratic
        stop_chosen=placeholder(bool),  # tdpo: no gradient of the chosen KL (TDPO2)
        baseline="",  # bco, bco_unpaired: running or zero
        divergence="",  # of the margin losses: reverse_kl, forward_kl, js, alpha, chi_squared
        divergence_alpha=number(),  # of the divergence alpha
        ld_alpha=number(),  # weight of tokens beyond the shorter response's length (LD-DPO)
        ld_weight_reference=placeholder(bool),  # whether ld_alpha weighs the reference, too
        # Bounds of a token's log-ratio, beyond which it gets no gradient (humanline); open is off.
        humanline_low=number(),  # -1 in the authors' code
        humanline_high=number(),  # 1.5 in the authors' code
        # Every so many steps the reference becomes the policy before the step's update; open is
        # never. Evaluations keep the first one.
        sync_every=placeholder(int),  # 1 in humanline's authors' code
        wpo="",  # weigh pairs by the policy's likelihood: corrected or plain (WPO)
        wpo_clamp=number(),  # the largest weight of WPO
    )


def _preference() -> ConfigDict:
    return ConfigDict(
        dict(
            data=_data("reviews", 6_000, 500),
            loss="dpo",  # a name of docs/losses.md: ipo, simpo, kto, ...; "dpo+sft" is a mixture
            loss_weights=(),  # of a mixture: one for each
            preset="",  # where open options come from: paper, trl-1.16, ... (losses.PRESETS)
            **_options(),
            lora=_lora(),  # under adapters, a reference without a path is their frozen base
            reference=ConfigDict(
                dict(
                    kind="cached",  # or live: computed in every step
                    # Of a live reference's weights; bfloat16 halves them. Under adapters the
                    # reference is their base, in lora.base_dtype.
                    dtype="float32",
                    path="",  # "" is the policy that the stage starts from
                    cache="",  # folder of cached log-probs; "" is inside the workdir
                )
            ),
            batch_size=64,  # examples of an optimiser step
            epochs=1,  # passes over the data
            steps=0,  # optimiser steps; 0: from epochs
            **_optimizer(3e-4),
        )
    )


def _reward() -> ConfigDict:
    """A reward model: the policy it starts from, with a scalar head."""
    return ConfigDict(
        dict(
            data=_data("reviews", 6_000, 500),
            loss="bradley_terry",  # or plackett_luce_scores, on whole rankings
            margin_scale=0.0,  # bradley_terry: the target margin is this times the score gap
            centring=0.01,  # weight of the squared sum of the scores of a pair or ranking; 0: off
            batch_size=64,  # examples of an optimiser step
            epochs=3,  # passes over the data
            steps=0,  # optimiser steps; 0: from epochs
            **_optimizer(3e-4) | dict(keep_best="eval/rewards/accuracies"),
        )
    )


def _classifier() -> ConfigDict:
    """A classifier of texts with labels: the decoder, with a logit for each label.

    Only the beginning of a text is read, without EOS. The keys tokens.* do not apply.
    """
    return ConfigDict(
        dict(
            data=_data("", 0, 2_000),  # form classified; limits take records from all over a file
            max_tokens=128,  # how many tokens of a text are read
            first_token=0,  # 0: learn at a text's last token; n: at every token from the n-th on
            batch_size=64,  # examples of an optimiser step
            epochs=1,  # passes over the data
            steps=0,  # optimiser steps; 0: from epochs
            **_optimizer(1e-3),
        )
    )


def _ppo() -> ConfigDict:
    """PPO on the policy's own responses: each iteration draws, scores and learns from a batch.

    Responses are drawn at temperature 1. Evaluations draw responses to held-out prompts
    (`samples`), and score them by `reward` where samples.reward is empty.
    """
    return ConfigDict(
        dict(
            reward="reviews",  # or reviews:log_odds, classifier:FOLDER, reward_model:FOLDER
            # The embedded task (reviews), a data file with a field prompt, a .txt file, or
            # prefixes:SOURCE[@SPLIT]: the first 2 to 8 tokens of texts. A tenth of the texts is
            # held out.
            prompts="reviews",
            limit=8_000,  # use this many prompts; 0 is all of a file
            steps=40,  # iterations
            batch_size=128,  # prompts of an iteration
            samples=1,  # responses to each
            max_new_tokens=64,  # the longest response
            epochs=1,  # passes of an iteration over its responses
            minibatches=4,  # optimiser steps of an epoch; a divisor of batch_size * samples
            # The schedule and its warm-up count iterations, and are the policy's alone.
            **_optimizer(1e-3) | dict(warmup_steps=0, schedule="linear"),
            value_learning_rate=3e-3,  # of the value model
            value_warmup=0,  # iterations at the start that train the value model alone
            clip=0.2,  # of the ratio policy / sampler
            value_clip=0.2,  # of a value's change, in reward
            discount=1.0,  # of a later token's reward
            gae_lambda=0.95,  # lambda of the advantages
            kl_coefficient=0.05,  # at the start, reward per nat
            kl_target=6.0,  # nats per response
            # In this many responses a relative error of 1 doubles the coefficient; 0: it is fixed.
            kl_horizon=256.0,
            missing_eos_penalty=0.0,  # taken off the reward of a response that did not stop
            max_kl=0.0,  # nats per token at which an iteration ends early; 0 is off
            entropy=0.0,  # bonus, in reward per nat; 0 is off
        )
    )


def _samples() -> ConfigDict:
    """Responses drawn from the policy at every evaluation of a preference stage or of PPO.

    Their reward, KL, lengths and win rate are logged under samples/.
    """
    return ConfigDict(
        dict(
            reward="",  # "" is off; reviews, classifier:FOLDER, reward_model:FOLDER
            # What compares each response with one of the reference's to the same prompt: "" is off;
            # exact, length, reward_model:FOLDER, openai:MODEL@URL, ... (docs/judging.md). Training
            # stops by it with stop_at="eval/samples/win_rate>=0.6", or with
            # keep_best="eval/samples/win_rate" and patience.
            judge="",
            judge_template="summary",  # the judge's prompt; see docs/judging.md
            prompts="reviews",  # held-out prompts: see ppo.prompts
            count=64,  # of them
            per_prompt=4,  # responses to each
            max_new_tokens=64,  # the longest response
            temperature=1.0,  # that they are drawn at; 0 is greedy
        )
    )


def _frontier() -> ConfigDict:
    """What scripts/frontier.py needs besides the stages; scripts/train.py reads none of it."""
    return ConfigDict(
        dict(
            # The true reward: see samples.reward. Or classifier, which first trains
            # config.classifier from the SFT policy's weights.
            reward="reviews",
            prompts="reviews",  # to make preferences for and to train PPO on: see ppo.prompts
            count=2_000,  # of them
            completions=4,  # of each, by the SFT policy
            pairs="ranked",  # all completions in one ranking; or all, or best_worst
            labels="deterministic",  # or bradley_terry
            truncated="drop",  # what to do with completions that reached the length limit; or keep
            reference_samples=512,  # of each held-out prompt: for best-of-n and the optimum
            best_of_n=(2, 4, 8, 16, 32, 64, 128),  # values of n
            online_rounds=4,  # of online DPO, which share `count`
            online_beta=0.1,  # of --add=online_dpo
        )
    )


def _recipe() -> ConfigDict:
    """What scripts/recipe.py needs besides the stages; scripts/train.py reads none of it.

    Sources are what STAGE.data.source takes. Prompts with all their records are shared out between
    training, the judge and the test by a hash of their text.
    """
    return ConfigDict(
        dict(
            data="",  # a folder that a config file may put before the names of its files
            comparisons="",  # of two responses or more
            comparisons_split="",  # of `comparisons`, as STAGE.data.split
            demonstrations="",  # for SFT; "" takes the reference, or the best response, of each
            demonstrations_split="",  # of `demonstrations`, as STAGE.data.split
            texts="",  # to train a new model on before SFT; "" starts SFT from the config's model
            texts_split="",  # of `texts`, as STAGE.data.split
            tests="",  # prompts with references to judge on; "" takes those of test_share
            tests_split="",  # of `tests`, as STAGE.data.split
            shifted="",  # prompts of another domain, to judge on as well
            shifted_split="",  # of `shifted`, as STAGE.data.split
            # Of the prompts of comparisons: no run trains on these. Evaluations of the runs read
            # them, and without `tests` they are judged on.
            test_share=0.1,
            judge_share=0.0,  # of them, to train a reward model on that is the judge
            test_prompts=256,  # most that are judged on; 0 is all
            shifted_prompts=100,  # the same, of `shifted`
            max_words=0,  # do not judge on longer prompts; 0: on all
            max_reference_words=0,  # nor on those whose reference is longer
            instruction="",  # text before a prompt for a model that was not trained on the task
            shots=2,  # examples of few-shot prompting
            # See scripts/judge.py. "trained" is a reward model, trained on judge_share.
            judge="trained",
            judge_template="summary",  # of judges that read a prompt
            temperatures=(0.0, 0.25, 0.5, 0.75, 1.0),  # that responses are drawn at
            shifted_temperatures=(0.0, 0.25),  # the same, of `shifted`
            best_of=128,  # of the SFT policy's responses the one with the highest learned reward
            max_new_tokens=64,  # the longest response
            stop_text="",  # a response ends before this text: what an untrained model goes on with
            betas=(0.1,),  # of DPO: a policy each
            checkpoints=0,  # judge so many checkpoints of a training run, equally far apart
        )
    )


def _sweep() -> ConfigDict:
    """How the members of a sweep are trained together: see scripts/sweep.py."""
    return ConfigDict(
        dict(
            at_once=0,  # members that are trained at once; 0: as many as memory holds
            axis=0,  # devices, out of mesh.data, that members are spread over; 0: as many as divide
            vmapped=0,  # members that a device computes as one; 0: one on a CPU, else all it has
        )
    )
