"""Benchmarks of the library, alone and compared with other libraries. README.md explains them; they are not installed.

``python -m bench`` is the only entry point (``__main__.py``). Folders are named after their subject::

    cpu/     products and layers on the CPU, the claims, two builds, the cost model
    opencl/  the same on OpenCL devices
    models/  whole models: loading, memory, speed in transformers
    peers/   other libraries, each behind one interface, and the comparison with them
    report/  tables, pictures and bars of a saved comparison
    common/  timing, shapes, random weights, options, facts about the machine

Modules import each other as ``bench.x.y``, from the folder above this one.
"""
