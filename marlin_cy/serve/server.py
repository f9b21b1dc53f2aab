"""The server: a socket, signals, and the end."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from marlin_cy.errors import MarlinError
from marlin_cy.serve.api import new_app
from marlin_cy.serve.service import Service

__all__ = ["Server", "address_of", "listen", "open_socket"]

UNREAD_MILLISECONDS = 60_000
"""After this time the system ends a connection whose client does not read."""

MOST_CONNECTIONS = 1000
LOGGER = logging.getLogger("uvicorn.error")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound, and not listening yet.

    Raises
    ------
    MarlinError
        The address does not exist, is in use, or may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise MarlinError(f"--host: got {host!r}, expected an address of this machine ({error.strerror})") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
        with contextlib.suppress(OSError):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MILLISECONDS)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _named(error, host, port) from None
    return bound


def listen(bound: socket.socket) -> None:
    """Let clients connect.

    Raises
    ------
    MarlinError
        Another program listens at the same address by now.
    """
    try:
        bound.listen(MOST_CONNECTIONS)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _named(error, host, port) from None


def _named(error: OSError, host: str, port: int) -> MarlinError:
    if error.errno == errno.EADDRINUSE:
        return MarlinError(f"--port: {port} of {host} is in use by another program; give another --port, or 0 for any")
    return MarlinError(f"--host {host} --port {port}: {error.strerror}")


def address_of(bound: socket.socket) -> str:
    """The URL of a server."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """An HTTP server that ends after the answers that it has accepted.

    The first SIGINT or SIGTERM begins the end, a second SIGINT ends at once.

    Parameters
    ----------
    service : Service
        Started and ended with the server.
    api_key : str, optional
        As in :func:`~marlin_cy.serve.api.new_app`.
    on_end : callable
        Called when the end begins.
    """

    def __init__(self, service: Service, api_key: str | None = None, on_end: Callable[[], None] = lambda: None) -> None:
        LOGGER.setLevel(logging.ERROR)  # below: a line for each client that sends no HTTP
        super().__init__(
            uvicorn.Config(
                new_app(service, api_key),
                lifespan="off",
                access_log=False,
                proxy_headers=False,  # no answer depends on a client's address
                log_config=None,
                limit_concurrency=MOST_CONNECTIONS,
                ws="none",
            )
        )
        self._service = service
        self._on_end = on_end

    def serve_on(self, bound: socket.socket) -> None:
        """Serve on a socket that listens, until the end. :attr:`should_exit` begins the end from another thread."""
        try:
            self.run(sockets=[bound])
        finally:
            self._service.engine.close(finish=False)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the service, then take connections."""
        self._service.start()
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As the base class's, without raising the signal again: the end is as wanted."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end, or end at once."""
        if not self.should_exit:
            self.should_exit = True
            self._on_end()
        elif sig == signal.SIGINT:
            self.force_exit = True
            LOGGER.setLevel(logging.CRITICAL)  # answers that are cut off are no faults
