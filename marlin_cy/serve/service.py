"""A model that is served: from prompts to answers. Its methods run on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from marlin_cy.decoder.generate import check_tokens, new_writer, tokenizer_of
from marlin_cy.decoder.sampling import SamplingParams, read_sampling
from marlin_cy.errors import CheckpointError
from marlin_cy.serve.answer import Answer
from marlin_cy.serve.bodies import Body, ChatBody, CompletionBody
from marlin_cy.serve.engine import Engine, EngineStopped
from marlin_cy.serve.errors import ApiError
from marlin_cy.serve.metrics import Metrics
from marlin_cy.serve.protocol import ServedModel
from marlin_cy.serve.request import Output, Request
from marlin_cy.serve.scheduler import QueueFull, Scheduler

__all__ = ["Service"]

COMPLETION_TOKENS = 16
"""The default of ``max_tokens`` in ``/v1/completions``, as in OpenAI's interface."""


class Service:
    """A model, its tokenizer, and the engine that runs it.

    Parameters
    ----------
    model : ServedModel
    name : str
        What clients call it.
    max_sequences, max_waiting : int
        As in :class:`~marlin_cy.serve.scheduler.Scheduler`.
    """

    def __init__(self, model: ServedModel, name: str, *, max_sequences: int, max_waiting: int) -> None:
        self.model, self.name = model, name
        self.created = int(time.time())
        self.tokenizer = tokenizer_of(model)
        self.engine = Engine(Scheduler(model, max_sequences=max_sequences, max_waiting=max_waiting), self._deliver)
        self.metrics = Metrics(self.engine.scheduler.counts)
        self._sampling = read_sampling(model.folder)
        try:
            self.tokenizer.check_chat()
            self.no_chat: str | None = None
        except CheckpointError as error:
            self.no_chat = error.reason
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the engine, for the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    @property
    def description(self) -> dict[str, Any]:
        """The model, as ``/v1/models`` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "marlin_cy",
            "max_model_len": self.model.context_length,
            "chat": self.no_chat is None,
        }

    # From a body to an answer ------------------------------------------------------------------

    async def chat(self, body: ChatBody) -> Answer:
        """Begin the answer to messages.

        Raises
        ------
        ApiError
        """
        self._check_model(body)
        if self.no_chat is not None:
            raise ApiError(400, f"the model {self.name}: {self.no_chat}", code="no_chat_template")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs", code="invalid_field", param="top_logprobs")
        messages = [_plain_message(index, message) for index, message in enumerate(body.messages)]
        tools = body.tools if body.tools and body.tool_choice != "none" else None
        try:
            # In a thread: a template may run for seconds.
            tokens = await asyncio.to_thread(
                self.tokenizer.chat_tokens, messages, tools=tools, options=body.chat_template_kwargs
            )
        except (CheckpointError, TypeError, ValueError) as error:
            reason = error.reason if isinstance(error, CheckpointError) else str(error)
            raise ApiError(400, reason, code="invalid_field", param="messages") from error
        most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        scores = (body.top_logprobs or 0) if body.logprobs else None
        return self._begin("messages", [tokens], body, most, scores, continues=False)

    async def complete(self, body: CompletionBody) -> Answer:
        """Begin the continuation of prompts.

        Raises
        ------
        ApiError
        """
        self._check_model(body)
        prompt: Any = body.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise ApiError(400, "prompt: got no prompt, expected at least 1", code="invalid_field", param="prompt")
        try:
            prompts = [
                await asyncio.to_thread(self.tokenizer.encode, one) if isinstance(one, str) else one for one in prompt
            ]
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", code="invalid_field", param="prompt") from error
        most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return self._begin("prompt", prompts, body, most, body.logprobs, continues=True)

    def _begin(
        self,
        name: str,
        prompts: Sequence[list[int]],
        body: Body,
        max_new_tokens: int | None,
        scores: int | None,
        *,
        continues: bool,
    ) -> Answer:
        """Submit ``n`` requests for each prompt."""
        count = body.n or 1
        limit = self.engine.scheduler.limit
        if count * len(prompts) > limit:
            raise ApiError(
                400, f"n: got {count} texts for {len(prompts)} prompts, expected at most {limit} together", param="n"
            )
        params = self._params(body)
        answer = Answer(stream=bool(body.stream))
        for prompt in prompts:
            self._check_prompt(name, prompt)
            for number in range(count):
                index = len(answer.requests)
                writer = new_writer(
                    self.model,
                    self.tokenizer,
                    prompt,
                    replace(params, seed=_nth_seed(params.seed, number)) if number else params,
                    max_new_tokens,
                    continues=continues,
                    stops=not body.ignore_eos,
                )
                answer.add(Request(prompt, writer, top_scores=scores, owner=answer, index=index))
        try:
            self.engine.submit(answer.requests)
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"}) from None
        except EngineStopped as error:
            raise ApiError(503, str(error), code="stopped") from None
        return answer

    def _check_model(self, body: Body) -> None:
        if body.model not in (None, self.name):
            raise ApiError(
                404, f"model: got {body.model!r}, expected {self.name!r}", code="model_not_found", param="model"
            )

    def _check_prompt(self, name: str, tokens: list[int]) -> None:
        try:
            check_tokens(name, tokens, self.model)
        except ValueError as error:
            code = "context_length_exceeded" if len(tokens) >= self.model.context_length else "invalid_field"
            raise ApiError(400, str(error), code=code, param=name) from None

    def _params(self, body: Body) -> SamplingParams:
        """What the request says about sampling; else what the folder says. A seed is drawn if none is given."""
        try:
            seed = random.getrandbits(63) if body.seed is None else body.seed
            return replace(self._sampling, **body.sampling(), seed=seed)
        except (TypeError, ValueError) as error:
            name = str(error).partition(":")[0]
            raise ApiError(400, str(error), code="invalid_field", param=name) from None

    # From outputs to answers -------------------------------------------------------------------

    def _deliver(self, outputs: list[Output]) -> None:
        """Pass the outputs of a step on, and wake those that wait for them. On the engine's thread."""
        woken = {output.request.owner: None for output in outputs if output.request.owner.put(output)}
        if woken:
            assert self._loop is not None
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                self._loop.call_soon_threadsafe(_wake, list(woken))

    def end(self, answer: Answer, outcome: str, tokens: int) -> None:
        """Count an answer, and cancel what has not ended."""
        now = time.perf_counter()
        if not answer.ended:
            for request in answer.requests:
                self.engine.cancel(request)
        metrics = self.metrics
        metrics.answers.labels(outcome).inc()
        metrics.prompt_tokens.inc(answer.prompt_tokens)
        metrics.known_tokens.inc(answer.known_tokens)
        metrics.new_tokens.inc(tokens)
        metrics.answer.observe(now - answer.arrived)
        if answer.first is not None:
            metrics.first_token.observe(answer.first - answer.arrived)
            if tokens > len(answer.requests):
                texts = len(answer.requests)
                metrics.token.observe((now - answer.first) * texts / (tokens - texts))


def _wake(answers: list[Answer]) -> None:
    for answer in answers:
        answer.wake()


def _plain_message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a text: parts of text are joined, as chat templates expect it."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for number, part in enumerate(content):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                kind = part.get("type") if isinstance(part, dict) else part
                raise ApiError(
                    400,
                    f"messages[{index}].content[{number}]: got {kind!r}, expected a part with the type 'text'",
                    code="unsupported_field",
                    param="messages",
                )
    return {**message, "content": "".join(texts)}


def _nth_seed(seed: int | None, number: int) -> int | None:
    """The seed of the n-th text after one prompt: it counts up, and stays an int of 64 bits."""
    if seed is None:
        return None
    return (seed + number + (1 << 63)) % (1 << 64) - (1 << 63)
