"""Ends an engine's process when the process that started it is gone.

vLLM's engine and worker processes outlive a parent that was killed, and keep its memory and peers' blocks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection

_watching = False


def end_with_parent() -> None:
    """In a process that `multiprocessing` started: end it as soon as its parent is gone. Else: nothing."""
    global _watching
    parent = multiprocessing.parent_process()
    if parent is None or _watching:
        return
    _watching = True
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
