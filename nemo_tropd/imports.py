"""Imports of large libraries."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections(*, freeze: bool = False) -> Iterator[None]:
    """No garbage collection meanwhile.

    An import makes millions of objects, nearly all of which stay: collections that look through them again and again
    are a fifth of the time that NeMo and Megatron take to be imported. With ``freeze`` no later collection looks at
    what there is at the end, which is for the start of a process: garbage among it is never freed.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
            atexit.register(gc.unfreeze)  # or extensions (nanobind's, as Triton) take what stays for leaks, and say so
        if enabled:
            gc.enable()
