"""Decoder-only transformers over rows that share prompts, and their Hugging Face checkpoints.

`decoder.build(config)` gives pure functions over a plain dict of arrays. `huggingface.load` and
`huggingface.save` read and write such dicts as checkpoints of `transformers`. `scores` turns a
decoder into a reward or value model. `encoder` is a classifier of the BERT type.

A row is a sequence of columns, one token in each. It holds one or more examples (segments). An
example is a prompt (branch 0) and its responses (branches 1, 2, ...). A token sees the earlier
tokens of its own branch and of its prompt.

Letters for shapes, in comments of all files here:

    R  rows                      D  width                        L  layers
    T  columns of a row          H  heads of queries             V  vocabulary
    S  columns of the keys       K  heads of keys and values     B  prompts
    E  size of a head            G  H / K, heads that share keys N  samples of a prompt
                                                                 P  columns of a prompt
"""
