"""The thread that runs a scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from marlin_cy.errors import MarlinError
from marlin_cy.serve.request import Output, Request
from marlin_cy.serve.scheduler import Scheduler

__all__ = ["Engine", "EngineStopped"]


class EngineStopped(MarlinError):
    """The engine takes no more requests: it ends, or an error has ended it."""


class Engine:
    """Runs a scheduler in a thread of its own, while there are requests.

    Parameters
    ----------
    scheduler : Scheduler
    deliver : callable
        Called on the engine's thread with the outputs of each step. It must return soon, and not raise.

    Attributes
    ----------
    scheduler : Scheduler
    error : BaseException or None
        What has ended the engine. It is a fault of this library: failures of requests and devices do not end it.
    """

    def __init__(self, scheduler: Scheduler, deliver: Callable[[list[Output]], None]) -> None:
        self.scheduler = scheduler
        self.error: BaseException | None = None
        self._deliver = deliver
        self._work = threading.Condition()
        self._closing = self._aborting = False
        self._thread = threading.Thread(target=self._run, name="marlin-cy engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closing

    def submit(self, requests: Sequence[Request]) -> None:
        """Accept requests, all or none. Any thread may call this.

        Raises
        ------
        QueueFull
        EngineStopped
        """
        with self._work:
            if not self.running:
                raise EngineStopped("the server is ending" if self.error is None else "the engine has failed")
            self.scheduler.submit(requests)
            self._work.notify()

    def cancel(self, request: Request) -> None:
        """End a request soon. Any thread may call this."""
        self.scheduler.cancel(request)

    def close(self, *, finish: bool = True) -> None:
        """End the thread: after all accepted requests, or after the step that runs. Requests that are left fail."""
        with self._work:
            self._closing = True
            self._aborting = self._aborting or not finish
            self._work.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                outputs = self.scheduler.step()
                if outputs:
                    self._deliver(outputs)
            self._deliver(self.scheduler.abort(EngineStopped("the server has ended")))
            self.scheduler.close()
        except BaseException as error:
            self.error = error
            self._deliver(self.scheduler.abort(EngineStopped(f"the engine has failed ({error!r})")))

    def _wait(self) -> bool:
        """Wait until there is work; False at the end."""
        with self._work:
            while not self.scheduler.open and not self._closing:
                self._work.wait()
        return not self._aborting and self.scheduler.open > 0
