"""Checkpoint folders: what they hold, and their weights, loaded to a backend or written as a packed folder.

The path of a weight::

    a quantiser's folder                                     a packed folder
    *.safetensors                                            *.safetensors
        │ safetensors.py: memory map                             │ safetensors.py: memory map
    tensors of a linear layer                                PackedTiles
        │ formats/: Scheme.to_canonical                          ├── Backend.stack_from_packed: a stack over the map,
    CanonicalWeight (canonical)                                       │   if the backend uses this layout
        │                                                        │ else PackedTiles.canonical
        │                                                    CanonicalWeight (canonical)
        │                                                        │
        └── StackBuilder.add, one weight at a time ──────────────┘
                              │ StackBuilder.finish
                      stack on a backend ── packed_writer.py: a stack of the CPU, written as a packed folder

::

    checkpoint.py      open_checkpoint and Checkpoint: a folder and its MoE layers
    contents.py        what a path holds
    family_rows.py     model families: names of modules, and routing
    families.py        what config.json says about MoE layers       naming.py    names in the files
    moe_block.py       a block's routing and shared expert           foreign.py   layers of other formats
    problems.py        what loading would refuse                     scaled.py    linear layers of 8 bits with scales
    quantised.py       QuantizedSource: the layers of a quantiser's folder, with expert_parts.py, quantised_layers.py
    packed.py          PackedSource: the layers of a packed folder
    packed_writer.py   write_packed
    safetensors.py     memory-mapped files
    gguf/              GGUF models, which have the same parts
"""
