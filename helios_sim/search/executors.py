"""Where points are run: in this process, in several, or on a dask cluster, by one protocol.

The protocol is `concurrent.futures.Executor`, which dask clients speak too.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, TypeVar

from helios_sim.errors import InputError, install_command

T = TypeVar("T")

TABLES_KEPT = 4
"""Policies and profiles that a worker's points go back and forth between."""
CONNECT_S = 20
"""Seconds a cluster's scheduler has to answer."""


@dataclass(frozen=True)
class Workers:
    """An executor, and how many points it is given before the first is answered."""

    executor: Executor
    max_in_flight: int


class InlineExecutor(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """The finished future of a call."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def usable_cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def open_workers(
    num_processes: int | None = None, scheduler: str | None = None
) -> Iterator[Workers]:
    """Workers: a cluster's with `scheduler`, else processes, one a processor unless said."""
    if scheduler is not None:
        with _cluster(scheduler) as workers:
            yield workers
        return
    processes = num_processes or usable_cpus()
    if processes == 1:
        from helios_sim.experiment import forget_traces
        from helios_sim.loop.world import keep_tables

        before = keep_tables(TABLES_KEPT)
        try:
            yield Workers(InlineExecutor(), 1)
        finally:
            forget_traces()
            keep_tables(before)
        return
    # Workers start afresh: a forked one would inherit the locks of this process's threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=prepare_worker)
    try:
        yield Workers(pool, 2 * processes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def prepare_worker() -> None:
    """Make a worker end with its parent, and keep collections off what never goes away.

    An interrupt reaches every process of a terminal; what to do about it is the parent's matter.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    import helios_sim.search.points  # noqa: F401 - what every point needs
    from helios_sim.loop.world import keep_tables

    keep_tables(TABLES_KEPT)
    gc.collect()
    gc.freeze()


def _end_with(sentinel: int) -> None:
    """A worker waits for work on a pipe that it holds open itself, so it would wait for ever."""
    wait([sentinel])
    os._exit(1)


@contextmanager
def _cluster(scheduler: str) -> Iterator[Workers]:
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        raise InputError(
            f"A cluster needs dask.distributed: {install_command('cluster')}.",
            f"--scheduler {scheduler}",
        ) from None
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_S)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(
            f"No scheduler of a cluster answers there: {error}.", f"--scheduler {scheduler}"
        ) from error
    with client:
        num_threads = sum(client.nthreads().values())
        if not num_threads:
            raise InputError("The cluster has no worker.", f"--scheduler {scheduler}")
        # Points are functions of their content, but nothing is kept on the cluster: results are.
        yield Workers(client.get_executor(pure=False), 4 * num_threads)


def is_death(error: BaseException) -> bool:
    """Whether an error of a future means that its worker is gone."""
    if isinstance(error, BrokenProcessPool):
        return True
    return type(error).__module__.split(".")[0] == "distributed"
