"""How fast the library is, by itself and beside others; README.md explains. Not installed with it.

Modules import each other as ``bench.x``, from the folder above. ``python -m bench`` finds that folder as the
current one; the scripts beside this file, run as ``python bench/bench_gemm.py``, put it on the path.
"""
