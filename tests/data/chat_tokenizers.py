"""A tokenizer of single characters with a chat template, and turns of a dialogue."""

import tokenizers
import transformers

# Each token is one character, or one of these.
MARKS = ["<s>", "</s>", "<u>", "<a>", "<t>", "<s!>", "<e>", "<think>", "</think>"]
CHARACTERS = [chr(i) for i in (10, *range(32, 127))]

PLAIN = (
    "{% for m in messages %}<{{ {'user': 'u', 'assistant': 'a', 'tool': 't', 'system': 's!'}"
    "[m.role] }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}<e>\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def letters(template=PLAIN, eos="<e>", **options):
    vocabulary = {token: i for i, token in enumerate([*MARKS, *CHARACTERS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    added = [tokenizers.AddedToken(mark, normalized=False) for mark in MARKS]
    core.add_special_tokens(added[:-2])
    core.add_tokens(added[-2:])  # marks of reasoning may stand in a text
    core.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, chat_template=template, **options
    )


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}
