"""ZeroGPU: on Spaces that lend a GPU for the time of a call, the package `spaces` is there and marks such calls."""

import functools
from collections.abc import Callable

try:
    import spaces  # before torch touches the GPU
except ImportError:
    spaces = None

GPU_SECONDS = 30


def on_gpu(function: Callable) -> Callable:
    """The function, on the lent GPU where there is one."""
    if spaces is None:
        return function

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return spaces.GPU(duration=GPU_SECONDS)(call)
