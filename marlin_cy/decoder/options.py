"""The values that options of a whole model may have, for the decoder and its commands."""

__all__ = ["CACHE_DTYPE", "CACHE_DTYPES", "LM_HEADS"]

CACHE_DTYPES = ("float16", "bfloat16", "float32")
"""What a cache may hold keys and values in."""

CACHE_DTYPE = "float16"
"""The default."""

LM_HEADS = ("int8",)
"""What a head may be rounded to when it is loaded."""
