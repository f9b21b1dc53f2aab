"""GGUF files, llama.cpp's format: configuration, tokenizer and weights in one file, or in parts.

::

    header ──┬── metadata ── config.py ── what config.json says
             │               tokenizer.py ── tokenizer.json, tokenizer_config.json, generation_config.json
             └── tensors ─── architectures.py, views.py ── the family's names and order ── tensors.py: GgufTensors
                                                                       │
                             blocks.py: a block type's canonical form ─┴─ source.py: GgufSource, stacks and layers

::

    block_types.h      one row per block type; _blocks.pyx: blocks as packed tiles, as canonical arrays, as floats
    files.py           which files a path means
    reader.py          the header of a file, checked
    package.py         types of tensors; the package gguf for those that this library does not read itself
    metadata.py        typed fields
    model.py           open_gguf: all of this for one path
"""
