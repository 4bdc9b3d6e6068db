"""Imports of large libraries, at the start of a process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection meanwhile, and none that looks at what there is then.

    An import makes millions of objects, nearly all of which stay: collections that look through them again and again
    are a fifth of the time that NeMo, Megatron or vLLM take to be imported.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
