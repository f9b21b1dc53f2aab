"""HTTP: routes, and answers at once or as streams."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from marlin_cy.serve.answer import Answer, Part
from marlin_cy.serve.bodies import Body, ChatBody, CompletionBody, read_body
from marlin_cy.serve.errors import ApiError, error_body
from marlin_cy.serve.forms import ChatForm, CompletionForm, Form
from marlin_cy.serve.metrics import CONTENT_TYPE
from marlin_cy.serve.service import Service

__all__ = ["MOST_BODY_BYTES", "new_app"]

MOST_BODY_BYTES = 1 << 24
BODY_SECONDS = 60.0
"""The longest time in which a client may send a body."""

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy must not wait for more
}


def new_app(service: Service, api_key: str | None = None) -> Starlette:
    """The application of a service, for an ASGI server. The service is started on the server's event loop.

    Parameters
    ----------
    service : Service
    api_key : str, optional
        What clients must send as ``Authorization: Bearer KEY``, except for ``/`` and ``/health``.
    """
    app = _App(service, api_key)

    routes = [
        Route("/", app.page),
        Route("/health", app.health),
        Route("/metrics", app.guarded(app.metrics)),
        Route("/v1/models", app.guarded(app.models)),
        Route("/v1/models/{name:path}", app.guarded(app.model)),
        Route("/v1/chat/completions", app.guarded(app.chat), methods=["POST"]),
        Route("/v1/completions", app.guarded(app.complete), methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _other_error},
    )


Endpoint = Callable[[HttpRequest], Awaitable[Response]]


class _App:
    """The endpoints."""

    def __init__(self, service: Service, api_key: str | None) -> None:
        self._service = service
        self._key = None if api_key is None else api_key.encode()
        self._page = (files("marlin_cy.serve") / "page.html").read_text("utf-8")
        self._policy = _content_policy(self._page)

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """An endpoint that needs the key."""

        async def checked(request: HttpRequest) -> Response:
            if self._key is not None:
                kind, _, given = request.headers.get("authorization", "").partition(" ")
                if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
                    raise ApiError(
                        401,
                        "the key: " + ("wrong" if given else "missing") + ", expected Authorization: Bearer KEY",
                        code="invalid_api_key",
                        headers={"WWW-Authenticate": "Bearer"},
                    )
            return await endpoint(request)

        return checked

    async def page(self, _: HttpRequest) -> Response:
        """The chat page."""
        return Response(
            self._page,
            media_type="text/html; charset=utf-8",
            headers={
                "content-security-policy": self._policy,
                "x-content-type-options": "nosniff",
                "referrer-policy": "no-referrer",
            },
        )

    async def health(self, _: HttpRequest) -> Response:
        """200 while requests are taken, else 503."""
        if self._service.engine.running:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopped"}, 503)

    async def metrics(self, _: HttpRequest) -> Response:
        """For Prometheus."""
        return Response(self._service.metrics.page(), headers={"content-type": CONTENT_TYPE})

    async def models(self, _: HttpRequest) -> Response:
        """The only model."""
        return JSONResponse({"object": "list", "data": [self._service.description]})

    async def model(self, request: HttpRequest) -> Response:
        """The model of a name."""
        name = request.path_params["name"]
        if name != self._service.name:
            raise ApiError(
                404, f"model: got {name!r}, expected {self._service.name!r}", code="model_not_found", param="model"
            )
        return JSONResponse(self._service.description)

    async def chat(self, request: HttpRequest) -> Response:
        """The answer to messages."""
        with self._counting_refusals():
            body = read_body(ChatBody, await _body_of(request))
            answer = await self._service.chat(body)
        form = ChatForm(self._service.name, self._service.tokenizer, scored=bool(body.logprobs))
        return _AnswerResponse(self._service, answer, form, body)

    async def complete(self, request: HttpRequest) -> Response:
        """The continuation of prompts."""
        with self._counting_refusals():
            body = read_body(CompletionBody, await _body_of(request))
            answer = await self._service.complete(body)
        form = CompletionForm(self._service.name, self._service.tokenizer, scored=body.logprobs is not None)
        return _AnswerResponse(self._service, answer, form, body)

    @contextlib.contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except ApiError:
            self._service.metrics.answers.labels("refused").inc()
            raise


# ---------------------------------------------------------------------------------------------
# Answers


class _AnswerResponse(Response):
    """Sends an answer. If the client goes away, its texts are cancelled."""

    def __init__(self, service: Service, answer: Answer, form: Form, body: Body) -> None:
        self._service, self._answer, self._form, self._body = service, answer, form, body
        self._tokens = 0
        self._outcome = "gone"
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sends = self._send_stream(send) if self._body.stream else self._send_whole(scope, receive, send)
        sender, watcher = asyncio.ensure_future(sends), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            for task in (sender, watcher):
                task.cancel()
            self._service.end(self._answer, self._outcome, self._tokens)

    async def _parts(self) -> AsyncIterator[Part]:
        """What is new, to the end. An error of a text is the last part."""
        while parts := await self._answer.take():
            for part in parts:
                self._tokens += part.tokens
                if part.finish_reason is not None:
                    self._outcome = "stop" if part.finish_reason == "stop" else "length"
                yield part
                if part.error is not None:
                    self._outcome = "error"
                    return

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = {request.index: Part(request.index) for request in self._answer.requests}
        async for part in self._parts():
            if part.error is not None:
                failure = error_body(500, str(part.error), "failed")
                await JSONResponse(failure, 500)(scope, receive, send)
                return
            sums = whole[part.index]
            sums.text += part.text
            sums.tokens += part.tokens
            sums.scores += part.scores
            sums.finish_reason = part.finish_reason
        document = self._form.whole(self._answer, list(whole.values()))
        await JSONResponse(document)(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in self._form.first_chunks(self._answer):
            await _send_event(send, chunk)
        async for part in self._parts():
            if part.error is not None:
                await _send_event(send, error_body(500, str(part.error), "failed"))
                break
            if part.text or part.scores or part.finish_reason is not None:
                await _send_event(send, self._form.chunk(part))
        else:
            if self._body.includes_usage:
                await _send_event(send, self._form.usage_chunk(self._answer, self._tokens))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _gone(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_event(send: Send, document: dict[str, Any]) -> None:
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


# ---------------------------------------------------------------------------------------------
# Bodies and errors


async def _body_of(request: HttpRequest) -> bytes:
    """The body of a request, with limits of its type, size and time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site can send other types without being asked.
        raise ApiError(415, f"content-type: got {kind!r}, expected 'application/json'", code="invalid_content_type")
    try:
        return await asyncio.wait_for(_read(request), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body: not complete after {BODY_SECONDS:g} seconds", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the body: the client has gone") from None


async def _read(request: HttpRequest) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BODY_BYTES:
            raise ApiError(
                413,
                f"the body: got more than {MOST_BODY_BYTES} bytes",
                code="body_too_large",
                headers={"Connection": "close"},
            )
    return bytes(data)


async def _api_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Of Starlette: no such path, or another method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(error.status_code, message), error.status_code, headers=error.headers)


async def _other_error(_: HttpRequest, error: Exception) -> Response:
    """A fault of this library. Starlette raises it again afterwards, so that it is logged."""
    return JSONResponse(error_body(500, f"a fault of the server: {type(error).__name__}"), 500)


def _content_policy(page: str) -> str:
    """A policy that lets the page run its own script and style, and connect to this server alone."""

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
