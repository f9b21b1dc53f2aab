"""The parts that the stacks of all backends share.

::

    builder.py      CheckedStackBuilder: checks weights, and counts the columns that were packed
    base.py         PackedStack and PackedLinear: sizes, metadata, bias
    dispatches.py   the dispatches of gemm_phase_batched, copied and checked

A backend's own stack, linear layer and builder derive from these classes.
"""
