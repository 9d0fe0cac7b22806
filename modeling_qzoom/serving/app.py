"""The routes of the server, the same over any engine, and errors in the form of OpenAI's API."""

import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api import Api
from .config import ServeConfig
from .errors import CLIENT_GONE, NOT_FOUND, Failure, RequestFailed, failed, failure_of
from .events import Engine
from .metrics import Metrics
from .schema import ChatRequest


CHAT = "/v1/chat/completions"


class CountedRequests:
    """ASGI middleware that counts chat requests by status and time, streams until their last byte.

    Args:
        app: the application.
        metrics: where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http" or scope["path"] != CHAT:
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), CLIENT_GONE

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.requests.labels(str(status)).inc()
            self._metrics.whole.observe(time.monotonic() - began)


def _response(failure: Failure) -> JSONResponse:
    return JSONResponse(failure.body(), failure.status, failure.headers())


async def _on_error(request: Request, error: Exception) -> Response:
    return _response(failure_of(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    failure = Failure(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(failure.body(), failure.status, error.headers)


def _model_card(api: Api) -> dict[str, Any]:
    return {"id": api.config.name, "object": "model", "created": api.started, "owned_by": "qzoom"}


def _add_routes(app: FastAPI, api: Api) -> None:
    body = {"required": True, "content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}

    @app.post(CHAT, openapi_extra={"requestBody": body})
    async def chat(request: Request) -> Response:
        """Goes on with a chat."""
        try:
            return await api.chat(request)
        except Exception as error:  # here and not in a handler, whose framework would log our refusals as crashes
            return _response(failure_of(error))

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The one model of this server."""
        api.admit(request)
        return {"object": "list", "data": [_model_card(api)]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        """The model of this server, by its name."""
        api.admit(request)
        if name != api.config.name:
            raise failed(NOT_FOUND, f"the model of this server is {api.config.name!r}.", code="model_not_found")
        return _model_card(api)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether requests can be answered; needs no key."""
        await api.engine.check()
        return {"status": "draining" if api.is_draining else "ok"}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Figures for Prometheus."""
        api.admit(request)
        text, kind = api.metrics.text()
        return Response(text, media_type=kind)


def build_api(config: ServeConfig, engine: Engine) -> FastAPI:
    """The application over an engine; `app.state.api` holds what its routes share.

    Args:
        config: options of the server.
        engine: whoever answers: a `Worker`, or replicas of one.
    """
    api = Api(config, engine)
    app = FastAPI(title="Q-Zoom", docs_url=None, redoc_url=None)
    app.state.api = api
    _add_routes(app, api)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestFailed, _on_error)
    app.add_exception_handler(Exception, _on_error)
    app.add_middleware(CountedRequests, metrics=api.metrics)
    return app
