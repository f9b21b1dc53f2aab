"""The hosts of a model, and their exchanges."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from marlin_cy.distributed.shard import Shard
from marlin_cy.errors import GroupError, UnsupportedError

if TYPE_CHECKING:
    from marlin_cy.moe.layer import MoeLayer

__all__ = ["Communicator", "Group", "checksum"]

TIMEOUT = 20.0
"""Seconds that a host waits for the others, unless told otherwise."""

SPIN_SECONDS = 0.2
"""Seconds of polls without a pause: MPI moves a message on only while it is polled."""

PAUSE = 100e-6
"""Seconds between later polls. The other hosts are late, or lost."""

give_way = getattr(os, "sched_yield", lambda: time.sleep(0))
"""Let another process run, if one waits for this CPU: it may be one of the hosts."""

FIELDS = 48
"""Values that :meth:`Group.agree` compares, at most."""


class Request(Protocol):
    """An exchange that was begun."""

    def Test(self) -> bool:
        """Whether the exchange has ended."""


class Communicator(Protocol):
    """What a :class:`Group` needs: the part of mpi4py's ``Comm`` that it uses."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def Iallgatherv(self, sendbuf: Any, recvbuf: Any) -> Any:
        """Begin to gather every process's uint8 array; ``recvbuf`` is ``[array, counts]``. Returns a request."""


class Group:
    """Hosts that run one model together, each on its share of the weights.

    Every host makes the same calls, with the same arguments, in the same order. Each call first compares a checksum of
    its arguments over the hosts. A host that does not answer for ``timeout`` seconds is lost: the others raise
    :class:`~marlin_cy.errors.GroupError`, as does every later call.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Or an object with its ``rank``, ``size`` and ``Iallgatherv``. No other code may use it meanwhile: pass
        ``MPI.COMM_WORLD.Dup()`` if the program has exchanges of its own.
    timeout : float
        Seconds. Hosts that load from slow disks may need more.

    Raises
    ------
    TypeError, ValueError
        An invalid argument.
    """

    def __init__(self, comm: Communicator, *, timeout: float = TIMEOUT) -> None:
        for name in ("rank", "size", "Iallgatherv"):
            if not hasattr(comm, name):
                raise TypeError(f"comm: got {type(comm).__name__} without {name}, expected a communicator of mpi4py")
        if not isinstance(timeout, (int, float)) or not 0 < timeout < float("inf"):
            raise ValueError(f"timeout: got {timeout!r}, expected a positive number of seconds")
        self.rank, self.size, self.timeout = int(comm.rank), int(comm.size), float(timeout)
        self.seconds = 0.0
        """Seconds in exchanges so far, waiting for other hosts included."""
        self._comm = comm
        self._lost: str | None = None
        self._pending: list[Any] = []  # what an exchange that never ends still uses

    def __repr__(self) -> str:
        return f"Group(rank {self.rank} of {self.size})"

    def shard(self, scheme: str = "columns") -> Shard:
        """This host's share of a model, for :func:`~marlin_cy.open_checkpoint`.

        Parameters
        ----------
        scheme : {"columns"}

        Raises
        ------
        UnsupportedError
            Another scheme.
        """
        if scheme != "columns":
            raise UnsupportedError(f"scheme: got {scheme!r}, expected 'columns'")
        return Shard(self)

    def layer(self, layer: MoeLayer) -> MoeLayer:
        """This host's share of a layer that is whole on every host, such as one of weights in memory.

        The columns are copied; the whole layer may be dropped. Layers of a checkpoint that was opened with a shard are
        shares already.

        Parameters
        ----------
        layer : MoeLayer
            Of the CPU backend; the same on every host.

        Raises
        ------
        UnsupportedError
            A layer of another backend.
        ValueError
            There are more hosts than tiles of columns.
        """
        from marlin_cy.distributed.columns import layer_share

        return layer_share(self.shard(), layer)

    # Exchanges ---------------------------------------------------------------------------------

    def gather(self, send: Any, recv: Any, counts: Sequence[int]) -> None:
        """Fill ``recv`` with the bytes of every host, in the order of ranks.

        Parameters
        ----------
        send : buffer of ``counts[rank]`` bytes
        recv : writable buffer of ``sum(counts)`` bytes
        counts : sequence of int

        Raises
        ------
        GroupError
            A host is lost.
        """
        if self._lost is not None:
            raise GroupError(self._lost)
        start = time.perf_counter()
        buffers = np.frombuffer(send, np.uint8), [np.frombuffer(recv, np.uint8), list(counts)]
        try:
            request = self._comm.Iallgatherv(*buffers)
            self._wait(request, buffers)
        except GroupError:
            raise
        except Exception as error:
            self._lost = f"exchange with {self.size - 1} other hosts failed on rank {self.rank}: {error}"
            raise GroupError(self._lost) from error
        except BaseException:  # KeyboardInterrupt
            self._lost = f"rank {self.rank} was interrupted during an exchange; start all hosts again"
            self._pending.append(buffers)
            raise
        finally:
            self.seconds += time.perf_counter() - start

    def _wait(self, request: Any, buffers: Any) -> None:
        start = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - start
            if waited > self.timeout:
                self._pending += [request, buffers]
                self._lost = (
                    f"rank {self.rank} got no answer from the other hosts within {self.timeout:g} s: a host has ended, "
                    "or is in another call"
                )
                raise GroupError(self._lost)
            if waited < SPIN_SECONDS:
                give_way()
            else:
                time.sleep(PAUSE)

    def gather_values(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64 ``[size, len(values)]``: those of every host. The length is the same on all hosts."""
        found = np.empty((self.size, len(values)), np.int64)
        self.gather(values, found, [values.nbytes] * self.size)
        return found

    # Agreement ---------------------------------------------------------------------------------

    def agree(self, call: str, fields: Mapping[str, int]) -> None:
        """Compare a call and its arguments over the hosts.

        Parameters
        ----------
        call : str
            The name of the call.
        fields : mapping of str to int
            At most :data:`FIELDS` arguments: sizes, or checksums (:func:`checksum`). All hosts have the same names.

        Raises
        ------
        GroupError
            On every host, if two hosts differ, with the name of the field; or if a host has failed.
        """
        if self.size == 1:
            return
        found = self._gather_call(checksum(call), list(fields.values()))
        for rank in range(self.size):
            if found[rank, 0] == FAILED:
                self._lost = f"{call}: rank {rank} has failed; its own message says why"
                raise GroupError(self._lost)
        for rank in range(self.size):
            if found[rank, 0] != found[0, 0]:
                raise GroupError(
                    f"{call}: rank {rank} is in another call than rank 0; every host must make the same calls"
                )
            for index, name in enumerate(fields, start=1):
                if found[rank, index] != found[0, index]:
                    raise GroupError(
                        f"{call}: {name}: rank {rank} has other values than rank 0; every host must have the same"
                    )

    def _gather_call(self, call: int, values: Sequence[int]) -> npt.NDArray[np.int64]:
        """int64 ``[size, FIELDS + 1]``: what every host passes; zeros follow."""
        row = np.zeros(FIELDS + 1, np.int64)
        row[0], row[1 : len(values) + 1] = call, values
        return self.gather_values(row)

    @contextmanager
    def together(self, call: str) -> Iterator[None]:
        """Within this context, an exception of this host is announced to the others, which raise a GroupError too.

        The context must end with a call of :meth:`agree` on every host.
        """
        try:
            yield
        except GroupError:
            raise
        except Exception:
            if self.size > 1 and self._lost is None:
                with suppress(GroupError):  # the exception of this host says more
                    self._gather_call(FAILED, [])
                self._lost = f"{call}: rank {self.rank} has failed before; start all hosts again"
            raise


FAILED = -1
"""In place of the checksum of a call: the host has failed."""


def checksum(*parts: object) -> int:
    """A checksum of arrays, and of other values by their text. 0 to 2**63 - 1.

    Of an array larger than a few kilobytes, 64-bit words are added: quick, and it shows all but contrived differences.
    """
    total = 0
    for part in parts:
        if isinstance(part, np.ndarray):
            total = zlib.crc32(f"{part.dtype} {part.shape}".encode(), total) + array_sum(part)
        else:
            total = zlib.crc32(str(part).encode(), total & 0xFFFFFFFF)
        total &= 2**62 - 1
    return total


def array_sum(array: npt.NDArray[Any]) -> int:
    """A checksum of an array's bytes."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if data.size <= 4096:
        return zlib.crc32(data.data)
    words = data[: data.size // 8 * 8].view(np.uint64)
    return int(np.add.reduce(words)) % (2**61) + zlib.crc32(data[-4096:].data)
