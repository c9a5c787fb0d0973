"""The HTTP side: an ASGI application in OpenAI's dialect over an engine."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from modelglue.errors import did_you_mean
from modelglue.serve.answers import Form, error_object, event
from modelglue.serve.conversation import ClientGoneError, Conversation
from modelglue.serve.engine import BusyError, Engine
from modelglue.serve.jobs import Ended, Failed, Job, Piece, Started
from modelglue.serve.schema import ChatRequest, CompletionRequest, RequestError, parsed

R = TypeVar("R", CompletionRequest, ChatRequest)

#: kinds of `Failed`: HTTP status and OpenAI's type of error
_FAILURES = {
    "request": (400, "invalid_request_error"), "timeout": (408, "timeout_error"), "model": (500, "server_error"),
    "closed": (503, "server_error"),
}  # fmt: skip


@dataclass(frozen=True)
class Server:
    """What the endpoints share."""

    engine: Engine
    name: str
    created: int

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def completions(self, request: Request) -> Response:
        asked = await self._read(request, CompletionRequest)
        jobs = [self._job(asked, prompt=prompt, max_tokens=asked.tokens) for prompt in asked.prompts]
        return await self._answer(request, asked, jobs, Form(f"cmpl-{secrets.token_hex(12)}", self.name, int(time.time()), chat=False))

    async def chat(self, request: Request) -> Response:
        asked = await self._read(request, ChatRequest)
        jobs = [self._job(asked, messages=[message.plain() for message in asked.messages], max_tokens=asked.tokens)]
        return await self._answer(request, asked, jobs, Form(f"chatcmpl-{secrets.token_hex(12)}", self.name, int(time.time()), chat=True))

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "modelglue"}

    def _check_model(self, name: str) -> None:
        if name != self.name:
            near = did_you_mean(name, [self.name])
            raise RequestError(
                f"there is no model '{name}'.{near} This server has '{self.name}'.", status=404, param="model", code="model_not_found"
            )

    async def _read(self, request: Request, kind: type[R]) -> R:
        """The request's body: checked for size while it arrives, then for what it says."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("the content type must be application/json.", status=415)  # web pages cannot send that unasked
        body = await self._body(request)
        try:
            value = json.loads(body)
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RequestError("the body holds half of a surrogate pair, which is no text. Send whole characters.") from error
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}.") from error
        asked: R = parsed(kind, value)
        self._check_model(asked.model)
        limits = self.engine.limits
        choices = asked.choices * (len(asked.prompts) if isinstance(asked, CompletionRequest) else 1)
        if choices > limits.choices:
            raise RequestError(f"the request asks for {choices} choices; allowed are {limits.choices} at most.", param="n")
        if asked.tokens is not None and asked.tokens > limits.tokens:
            raise RequestError(f"max_tokens is {asked.tokens}; this server writes {limits.tokens} at most.", param="max_tokens")
        return asked

    async def _body(self, request: Request) -> bytes:
        limits, body = self.engine.limits, bytearray()
        try:
            async with asyncio.timeout(limits.timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limits.body:
                        raise RequestError(f"the body is larger than {limits.body:,} bytes. Send less.", status=413)
        except TimeoutError as error:
            raise RequestError(f"the body was not complete after {limits.timeout:g} seconds.", status=408) from error
        return bytes(body)

    def _job(self, asked: CompletionRequest | ChatRequest, **what: Any) -> Job:
        return Job(
            deliver=lambda event: None,
            until=asked.until,
            sampling=asked.sampling(),
            choices=asked.choices,
            stream=bool(asked.stream),
            **what,
        )

    async def _answer(self, request: Request, asked: CompletionRequest | ChatRequest, jobs: Sequence[Job], form: Form) -> Response:
        try:
            conversation = Conversation(self.engine, jobs)
        except BusyError as error:
            raise RequestError(str(error), status=503, code="busy") from error
        if asked.stream:
            return _Stream(conversation, form, asked.choices, len(jobs), usage_wanted=asked.usage_wanted)
        started: dict[int, Started] = {}
        ended: list[tuple[int, Ended]] = []
        async with aclosing(conversation.events(request.receive)) as events:
            async for number, said in events:
                if isinstance(said, Failed):
                    return _failed(said)
                if isinstance(said, Started):
                    started[number] = said
                elif isinstance(said, Ended):
                    ended.append((number * asked.choices + said.choice, said))
        return JSONResponse(form.whole([started[number] for number in sorted(started)], ended))


class _Stream(Response):
    """Server-sent events. What fails before anything was said is an ordinary error."""

    def __init__(self, conversation: Conversation, form: Form, choices: int, jobs: int, *, usage_wanted: bool) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._conversation, self._form, self._choices, self._jobs, self._usage_wanted = conversation, form, choices, jobs, usage_wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGoneError):
            await self._tell(scope, receive, send)

    async def _tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        form, started, ended = self._form, dict[int, Started](), list[Ended]()
        async with aclosing(self._conversation.events(receive)) as events:
            async for number, said in events:
                if isinstance(said, Failed):
                    if not started:
                        await _failed(said)(scope, receive, send)
                        return
                    await self._send(send, event(_error_of(said)))
                    break
                if isinstance(said, Started):
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started[number] = said
                    for choice in range(self._choices):
                        await self._send(send, event(form.opening(number * self._choices + choice, said)))
                elif isinstance(said, Piece):
                    await self._send(send, event(form.piece(number * self._choices + said.choice, said.text)))
                else:
                    ended.append(said)
                    await self._send(send, event(form.closing(number * self._choices + said.choice, said)))
            else:
                if self._usage_wanted:
                    await self._send(send, event(form.total(list(started.values()), ended)))
                await self._send(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})


class _Guard:
    """Requests without the key, or for another host, go no further; the health check needs no key."""

    def __init__(self, app: ASGIApp, key: str | None, hosts: Sequence[str] | None) -> None:
        self._app, self._key, self._hosts = app, None if key is None else key.encode(), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).strip("[]").lower()
        if self._hosts is not None and host not in self._hosts:
            body = error_object(f"the host is '{host}'; allowed is {', '.join(self._hosts)}.", "invalid_request_error", code="invalid_host")
            return JSONResponse(body, status_code=421)
        given = headers.get(b"authorization", b"")
        if self._key is not None and scope["path"] != "/health" and not hmac.compare_digest(given, b"Bearer " + self._key):
            body = error_object("the API key is missing or wrong.", "invalid_request_error", code="invalid_api_key")
            return JSONResponse(body, status_code=401)
        return None


def application(engine: Engine, name: str, *, api_key: str | None = None, hosts: Sequence[str] | None = None) -> Starlette:
    """The ASGI application. `hosts`: what a request's Host header may say (a web page that renames itself to localhost cannot get in)."""
    server = Server(engine, name, int(time.time()))
    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    middleware = [Middleware(_Guard, key=api_key, hosts=hosts)]
    handlers: Any = {RequestError: _refused, HTTPException: _not_found, ClientGoneError: _gone, ClientDisconnect: _gone}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def _refused(request: Request, error: RequestError) -> Response:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return JSONResponse(error_object(str(error), kind, param=error.param, code=error.code), status_code=error.status)


async def _not_found(request: Request, error: HTTPException) -> Response:
    known = "/v1/models, /v1/completions, /v1/chat/completions and /health"
    message = f"{request.method} {request.url.path}: {error.detail}. Known are {known}."
    return JSONResponse(error_object(message, "invalid_request_error"), status_code=error.status_code, headers=error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _failed(said: Failed) -> Response:
    return JSONResponse(_error_of(said), status_code=_FAILURES[said.kind][0])


def _error_of(said: Failed) -> dict[str, Any]:
    return error_object(said.message, _FAILURES[said.kind][1], code=said.code)
