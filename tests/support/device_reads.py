"""What the host asks of a GPU, refused: the program fails where it would wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_device_reads() -> Iterator[None]:
    """Within, a call that waits for the device is an error.

    torch warns once a process that it does not see every such call. As an error, that warning would come after the mode
    is set, and leave it set for every later test.
    """
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
