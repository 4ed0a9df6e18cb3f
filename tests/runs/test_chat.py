"""A dialogue has the messages that were exchanged; its replies are what the sampler draws."""

import os
import subprocess
import sys

import jax
import pytest

from dpojax.config.command_line import UsageError
from dpojax.data import reviews
from dpojax.models import decoder, huggingface
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.runs.chat import ChatSettings, Dialogue, NoRoom, one_line, require_template
from dpojax.runs.policy import load_policy
from dpojax.sampling import build_sampler, generate
from dpojax.stopping import interrupts_raise, listening

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
WORDS = reviews.prompts("train", 1, 0)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of the embedded task's words, whose tokenizer has a chat template."""
    tokenizer = reviews.tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = DecoderConfig(
        **LLAMA,
        vocab_size=len(tokenizer),
        width=16,
        layers=1,
        heads=2,
        kv_heads=2,
        mlp_width=16,
        max_positions=128,
    )
    params = decoder.build(config).init(jax.random.key(0))
    path = tmp_path_factory.mktemp("model")
    huggingface.save(path, config, params, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(str(folder))


@pytest.fixture
def drawn(monkeypatch):
    """Replies are "one two", in two pieces; the prompts that they were drawn for."""
    prompts = []

    def pieces(self, prompt):
        prompts.append(prompt)
        yield "one "
        yield "two"

    monkeypatch.setattr(Dialogue, "_pieces", pieces)
    return prompts


def text_of(policy, ids):
    return policy.tokenizer.decode(ids)


def test_each_prompt_holds_the_messages_before_it(policy, drawn):
    dialogue = Dialogue(policy, ChatSettings(system="i"))
    assert list(dialogue.reply("think")) == ["one ", "two"]
    list(dialogue.reply("it"))
    assert [message["role"] for message in dialogue.messages] == ["user", "assistant"] * 2
    expected = ["i think", "i think one two it"]
    encode = lambda text: policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert drawn == [encode(f"{text} ") for text in expected]
    dialogue.clear()
    list(dialogue.reply("it"))
    assert drawn[-1] == encode("i it ")


def test_again_puts_another_reply_in_place_of_the_last(policy, drawn):
    dialogue = Dialogue(policy, ChatSettings())
    with pytest.raises(ValueError, match="nothing was said"):
        dialogue.again()
    list(dialogue.reply("think"))
    list(dialogue.again())
    assert drawn[0] == drawn[1]
    assert len(dialogue.messages) == 2


def test_a_reply_that_is_stopped_stays_as_far_as_it_is(policy, drawn):
    dialogue = Dialogue(policy, ChatSettings())
    reply = dialogue.reply("think")
    next(reply)
    reply.close()
    assert dialogue.messages[-1] == {"role": "assistant", "content": "one "}


def test_a_dialogue_whose_reply_is_never_read_has_the_message_all_the_same(policy, drawn):
    """Ctrl-C during the first of two columns: the second model was asked, too."""
    first, second = (Dialogue(policy, ChatSettings()) for _ in range(2))
    for ask in (lambda one: one.reply("think"), lambda one: one.again()):
        replies = [ask(first), ask(second)]
        next(replies[0])
        for reply in replies:
            reply.close()
        assert first.messages[:1] == second.messages[:1] == [{"role": "user", "content": "think"}]
        assert second.messages[1:] == [{"role": "assistant", "content": ""}]


def test_what_no_longer_fits_is_forgotten_from_the_start(policy, drawn):
    dialogue = Dialogue(policy, ChatSettings())
    for _ in range(3):  # 128 positions
        list(dialogue.reply("think " * 50))
    assert dialogue.forgotten == 1
    assert len(drawn[-1]) < 128
    with pytest.raises(NoRoom, match=r"has \d+ tokens, and the model reads 112"):
        list(dialogue.reply("think " * 200))
    assert len(dialogue.messages) == 6  # as if it had not been said


def test_without_a_template_each_line_is_a_prompt_by_itself(policy, drawn):
    dialogue = Dialogue(policy, ChatSettings(template=False))
    list(dialogue.reply("think"))
    list(dialogue.reply("it"))
    begin = policy.tokenizer("it")["input_ids"]
    assert drawn[-1] == [x for x in begin if x != policy.tokenizer.eos_token_id]


def test_a_system_message_that_no_prompt_would_hold_is_refused(policy):
    require_template("m", Dialogue(policy, ChatSettings(system="i")))
    require_template("m", Dialogue(policy, ChatSettings(template=False)))
    with pytest.raises(UsageError, match="m would not read it, since --notemplate is given"):
        require_template("m", Dialogue(policy, ChatSettings(system="i", template=False)))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "role not supported.*--notemplate"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}", ""),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            "leaves it out",
        ),
    ],
)
def test_a_template_that_reads_no_system_message_is_told_before_the_first_line(
    policy, template, said, monkeypatch
):
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    with pytest.raises(UsageError, match=said or "--system: m .*refuses it: no system"):
        require_template("m", Dialogue(policy, ChatSettings(system="i")))


def test_a_message_that_the_template_refuses_is_as_if_it_had_not_been_said(policy, monkeypatch):
    template = "{% if messages[-1].content == 'think' %}{{ raise_exception('no') }}{% endif %}"
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    dialogue = Dialogue(policy, ChatSettings())
    with pytest.raises(ValueError, match="the chat template refuses it: no"):
        dialogue.reply("think")
    assert dialogue.messages == []


def test_a_reply_is_one_line_that_can_be_read_back():
    text = "a\n\tb \\n c"
    line = one_line(text)
    assert "\n" not in line
    assert "\t" not in line
    assert line.encode().decode("unicode_escape") == text


def test_ctrl_c_stops_a_reply_and_no_process():
    import signal

    with listening("chat"), interrupts_raise():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.long
def test_the_pieces_are_what_the_sampler_draws_at_once(policy):
    settings = ChatSettings(max_new_tokens=40, temperature=0.9, seed=3, template=False)
    dialogue = Dialogue(policy, settings)
    pieces = list(dialogue.reply(WORDS))
    assert len(pieces) > 1
    ids = policy.tokenizer(WORDS)["input_ids"]
    prompt = ids[:-1] if ids[-1] == policy.tokenizer.eos_token_id else ids
    sampler = build_sampler(policy.model, max_new_tokens=40, stop=policy.stop)
    with jax.set_mesh(policy.mesh):
        ((sample,),) = generate(
            sampler, policy.params, [prompt], batch_size=1, seed=3, temperature=0.9
        )
    at_once = policy.tokenizer.decode(sample.tokens, skip_special_tokens=True)
    assert "".join(pieces) == at_once


TYPES = """
import sys
from dpojax import display
from dpojax.commands import chat
from dpojax.runs import terminal

terminal.look_after()
with display.showing_on(sys.stderr):
    print(list(chat._lines(True)))
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_nothing_is_drawn_where_the_user_types():
    user, terminal = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    shown, child = b"", subprocess.Popen([sys.executable, "-c", TYPES], **streams)
    os.close(terminal)
    while b"> " not in shown:
        shown += os.read(user, 4096)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(1.2)  # two drawings would have come
    os.write(user, b"hello\n\x04")
    while b"]" not in shown:
        shown += os.read(user, 4096)
    assert child.wait(20) == 0
    os.close(user)
    assert b"> hello" in shown


@pytest.mark.slow
def test_the_command_answers_a_line_with_a_line(folder):
    lines = [WORDS, "", "/again", "/clear", "/nothing", WORDS, "/quit", WORDS]
    ended = subprocess.run(
        [sys.executable, "-m", "scripts.chat", f"--model={folder}", f"--beside={folder}"]
        + ["--max_new_tokens=8", "--seed=2"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == 0, ended.stderr
    replies = ended.stdout.split("\n")[:-1]
    assert len(replies) == 5  # three messages, an empty line, and the command that is none
    assert replies[1] == replies[3] == ""
    for reply in (replies[0], replies[2], replies[4]):
        first, second = reply.split("\t")
        assert first == second != ""  # the same model
    assert replies[0] != replies[2]
    assert "chat: /nothing: no such command; /help lists them" in ended.stderr.splitlines()
