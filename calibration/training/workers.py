"""One function of many items, in processes of their own; the answers come in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Final, TypeVar

Given = TypeVar("Given")
Found = TypeVar("Found")

MOST_PROCESSES: Final = 8
_ITEMS_AT_ONCE: Final = 8


@contextmanager
def workers_for(
    work: Callable[[Given], Found], processes: int
) -> Iterator[Callable[[Sequence[Given]], list[Found]]]:
    """What does some work for each of many items, in so many processes, in this one if it is one.

    Where processes cannot be had, as for a program that is read from a pipe, this one works.
    """
    if processes < 2:
        yield lambda items: list(map(work, items))
        return
    # Workers start afresh: a forked one would inherit threads' locks, and a GPU that is in use.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)

    def side_by_side(items: Sequence[Given]) -> list[Found]:
        try:
            with _uninterrupted():
                found = pool.map(work, items, chunksize=_ITEMS_AT_ONCE)
            return list(found)
        except BrokenProcessPool:
            return list(map(work, items))

    try:
        yield side_by_side
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def processes_for(num_items: int, least_items: int) -> int:
    """How many processes are worth their start: one below so many items, or on one processor."""
    if num_items < least_items:
        return 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MOST_PROCESSES, cpus or 1)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes begun here never hear of Ctrl-C, which is this one's matter; it hears it later."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Let a worker end when its parent is killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
