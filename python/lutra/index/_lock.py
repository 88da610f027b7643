"""A lock for many searches or one change."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

_all: weakref.WeakSet[ReadWriteLock] = weakref.WeakSet()


class ReadWriteLock:
    """Any number of readers at once, or one writer.

    A writer that waits holds back new readers, and when it is done the readers that waited go before the next
    writer: neither starves. A thread may read again while it reads, and do anything while it writes; writing
    while it reads is refused, for it would wait for itself.

    An uncontended read takes two dictionary operations and no system lock. It relies on them being atomic and
    in order: a reader enters itself, then looks for a writer; a writer enters itself, then looks for readers.
    """

    __slots__ = ("__weakref__", "_changed", "_depth", "_readers", "_waiting", "_writer")

    def __init__(self) -> None:
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._readers: dict[int, int] = {}  # thread: how many times it reads
        self._writer: int | None = None  # the thread that writes, or waits for the readers to leave
        self._depth = 0  # of the writer's own nested writes
        self._waiting: list[int] = []  # readers held back
        self._changed = threading.Condition(threading.Lock())

    def __reduce__(self):  # copies and pickles of an index have a lock of their own
        return ReadWriteLock, ()

    def acquire_read(self) -> None:
        me = get_ident()
        readers = self._readers
        if me in readers:
            readers[me] += 1
            return
        readers[me] = 1
        if self._writer is not None and self._writer != me:
            self._wait_to_read(me)

    def _wait_to_read(self, me: int) -> None:
        with self._changed:
            if self._writer is None:
                return
            del self._readers[me]
            self._waiting.append(me)
            self._changed.notify_all()  # the writer may have seen this reader
            try:
                while me not in self._readers:  # the writer enters it
                    self._changed.wait()
            except BaseException:  # interrupted
                if me in self._waiting:
                    self._waiting.remove(me)
                if self._readers.pop(me, None):
                    self._changed.notify_all()
                raise

    def release_read(self) -> None:
        me = get_ident()
        readers = self._readers
        if readers[me] > 1:
            readers[me] -= 1
            return
        del readers[me]
        if self._writer is not None:
            with self._changed:
                self._changed.notify_all()

    def acquire_write(self) -> None:
        me = get_ident()
        if self._writer == me:
            self._depth += 1
            return
        if me in self._readers:
            raise RuntimeError("an index cannot be changed from within a search of it (by its filter)")
        with self._changed:
            while self._writer is not None:
                self._changed.wait()
            self._writer = me
            try:
                while self._readers:
                    self._changed.wait()
            except BaseException:
                self._leave()
                raise

    def release_write(self) -> None:
        if self._depth:
            self._depth -= 1
            return
        with self._changed:
            self._leave()

    def _leave(self) -> None:
        self._writer = None
        for reader in self._waiting:
            self._readers[reader] = 1
        self._waiting.clear()
        self._changed.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """For a ``with`` statement; a search that counts microseconds calls the methods."""
        self.acquire_read()
        try:
            yield
        finally:
            self.release_read()

    @contextmanager
    def writing(self) -> Iterator[None]:
        self.acquire_write()
        try:
            yield
        finally:
            self.release_write()


def _after_fork() -> None:
    """In a forked child the other threads, who may have held locks, are gone."""
    for lock in list(_all):
        lock._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
