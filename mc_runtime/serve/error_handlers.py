"""Every error of the application in OpenAI's shape, those of FastAPI and Starlette too."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .errors import ApiError, api_error


def add_error_handlers(app: FastAPI) -> None:
    """Register them."""

    def respond(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:] if not isinstance(part, int) or len(first["loc"]) > 2)
        message = str(first["msg"]).removeprefix("Value error, ")
        text = f"{place}: {message}" if place else message
        return respond(ApiError(400, text, code="invalid_request", param=place or None))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ApiError):  # raised while the body was read
            return respond(cause)
        headers = None if error.headers is None else dict(error.headers)
        return respond(ApiError(error.status_code, str(error.detail), headers=headers))

    @app.exception_handler(Exception)
    async def other(_: Request, error: Exception) -> JSONResponse:
        return respond(api_error(error))
