"""Hosts in one process: threads, with an ``Iallgatherv`` of their own in place of MPI's."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from marlin_cy.distributed import Group


class Exchange:
    """One gather of all hosts."""

    def __init__(self, size):
        self.parts, self.size, self.ready = {}, size, threading.Event()

    def add(self, rank, part):
        self.parts[rank] = part
        if len(self.parts) == self.size:
            self.ready.set()


class FakeComm:
    """A communicator of one of several threads. ``shared`` is the state of all of them."""

    def __init__(self, shared, rank, size):
        self._shared, self.rank, self.size, self._calls = shared, rank, size, 0

    def Iallgatherv(self, sendbuf, recvbuf):
        received, counts = recvbuf
        assert len(counts) == self.size and sum(counts) == len(received)
        assert counts[self.rank] == len(sendbuf)
        with self._shared["lock"]:
            exchange = self._shared["exchanges"].setdefault(self._calls, Exchange(self.size))
            exchange.add(self.rank, sendbuf.copy())
        self._calls += 1
        return FakeRequest(exchange, received, counts)


class FakeRequest:
    def __init__(self, exchange, received, counts):
        self._exchange, self._received, self._counts = exchange, received, counts

    def Test(self):
        if not self._exchange.ready.wait(0.001):
            return False
        parts = [self._exchange.parts[rank] for rank in range(len(self._counts))]
        assert [len(part) for part in parts] == list(self._counts), "messages of other sizes than expected"
        self._received[:] = np.concatenate(parts)
        return True


def fake_groups(size, **options):
    """Groups of ``size`` hosts, one for each thread."""
    shared = {"lock": threading.Lock(), "exchanges": {}}
    return [Group(FakeComm(shared, rank, size), **options) for rank in range(size)]


def on_hosts(size, run, **options):
    """``run(group)`` on ``size`` hosts at once: the results in the order of ranks, exceptions included."""
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, group) for group in fake_groups(size, **options)]
    return [future.exception() or future.result() for future in futures]


def results_on_hosts(size, run):
    """As :func:`on_hosts`; the exception of a host is raised."""
    results = on_hosts(size, run)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
