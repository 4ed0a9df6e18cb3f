"""A judge behind a real server: `transformers serve` with a model whose every reply is known."""

import collections
import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from dpojax.evaluation.judging.asking import judge_comparisons
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.open_judge import open_judge
from dpojax.evaluation.judging.verdicts import Comparison, Outcome

pytestmark = pytest.mark.slow  # the server imports torch and transformers

# The question ends in the second response; the template's words offer a tie.
QUESTION = "Preferred: A , Preferred: B or Preferred: tie ? {prompt} : {first} , {second}"
# The model reads no more than the last word of the question, and replies with one word.
REPLIES = {
    "good": "Preferred: B",
    "bad": "Preferred: A",
    "fair": "Preferred: tie",
    "odd": "Well",
}
VOCABULARY = ["<unk>", "</s>", *REPLIES, *REPLIES.values()]
COMPARISONS = [
    Comparison("1", "one", "it is good", "it is bad"),
    Comparison("2", "two", "it is bad", "it is good"),
    Comparison("3", "three", "very fair", "it is fair"),
    Comparison("4", "four", "very good", "it is good"),
    Comparison("5", "five", "it is odd", "very good"),
]
OUTCOMES = [
    Outcome.WIN,
    Outcome.LOSS,
    Outcome.TIE,
    Outcome.INCONSISTENT,  # the second one, in both orders
    Outcome.UNPARSED,
]
NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")  # by transformers for serving
START_SECONDS = 120.0


def save_model(folder):
    """A Llama in which attention and MLP add nothing: each token decides the next one.

    Its embeddings are one-hot, and the rows of its head say what follows.
    """
    torch = pytest.importorskip("torch", reason="transformers serves its models with torch")
    import transformers

    size = len(VOCABULARY)
    ids = {word: number for number, word in enumerate(VOCABULARY)}
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=ids["</s>"],
        pad_token_id=ids["</s>"],
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_diagonal_(1.0)
        for word in VOCABULARY:
            model.lm_head.weight[ids[REPLIES.get(word, "</s>")], ids[word]] = 1.0
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)


class ServerEnded(Exception):
    """The server has ended before it answered; holds what it printed."""


@contextlib.contextmanager
def served(folder, log):
    """Serve the model in a folder; gives the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host=127.0.0.1", f"--port={port}", "--device=cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_it_answers(f"{address}/health", process, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_it_answers(address, process, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.1)
    raise ServerEnded(log.read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs `pip install {' '.join(missing)}`, with which transformers serves")
    folder = tmp_path_factory.mktemp("served") / "model"
    save_model(folder)
    return folder


def test_each_verdict_of_a_served_model_is_what_it_replies_and_a_second_call_asks_nothing(
    model, tmp_path
):
    (tmp_path / "question.txt").write_text(QUESTION)
    options = {"template_file": tmp_path / "question.txt", "max_tokens": 20}
    log = tmp_path / "server.log"
    with served(model, log) as address:
        judge = open_judge(f"openai:{model}@{address}", **options)
        with VerdictCache(tmp_path / "verdicts") as cache:
            first = judge_comparisons(judge, COMPARISONS, cache=cache, repeat=1.0)
    assert [judgement.outcome for judgement in first.judgements] == OUTCOMES
    said = [judgement.a_first.text for judgement in first.judgements]
    assert said == [REPLIES[comparison.b.split()[-1]] for comparison in COMPARISONS]
    assert first.asked == 2 * 2 * len(COMPARISONS)  # both orders, each twice
    assert all(one.choice == again.choice for one, again in first.repeats)
    requests = collections.Counter(log.read_text().split())["/v1/chat/completions"]
    assert requests == first.asked
    with VerdictCache(tmp_path / "verdicts") as cache:  # nobody listens any more
        second = judge_comparisons(judge, COMPARISONS, cache=cache, repeat=1.0)
    assert (second.asked, repr(second.judgements)) == (0, repr(first.judgements))
