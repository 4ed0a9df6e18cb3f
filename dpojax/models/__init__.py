"""Decoder-only transformers over rows that share prompts, and their Hugging Face checkpoints.

`decoder.build(config)` gives pure functions over a plain dict of arrays; `huggingface.load` and
`huggingface.save` exchange such dicts with `transformers`. `scores` makes reward and value models
of decoders; `encoder` is the BERT-type classifier.
"""
