"""GGUF files, llama.cpp's format: configuration, tokenizer and weights in one file, or in parts.

::

    header ──┬── metadata ── config.py ── what config.json says
             │               tokenizer.py ── tokenizer.json, tokenizer_config.json, generation_config.json
             └── tensors ─── architectures.py, views.py ── the family's names and order ── tensors.py: GgufTensors
                                                                       │
                             blocks.py: a block type's canonical form ─┴─ source.py: GgufSource, stacks and layers

::

    files.py           which files a path means
    reader.py          the header of a file, checked
    package.py         the package gguf: types, and the values of any block
    metadata.py        typed fields
    model.py           open_gguf: all of this for one path
"""
