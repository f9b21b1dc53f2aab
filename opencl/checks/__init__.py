"""Kernels against NumPy, the first time that they are used on a device.

Some drivers compile some kernels incorrectly, depending on the configuration. So a configuration is checked on a
tiny problem before its results are used::

    products.py        a product: a tier's gemm in one configuration, the preparation of its rows, the sum of its splits
    routing.py         routing, and the grouping of (token, choice) pairs by expert
    combination.py     the kernels around a layer's products: weighing of tokens, and the sum of the experts' rows
    random_weights.py  random weights for these, and for tuning
    verdicts.py        results of checks: in memory, and in the cache folder for the next process

The check that chooses a tier, ``selfcheck.py``, comes before these; its result is not kept on disk.
"""
