"""Every error of the application in OpenAI's shape, those of FastAPI and Starlette too."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import MegaContextError
from .errors import ApiError, api_error


def add_error_handlers(app: FastAPI) -> None:
    """Register them."""

    def respond(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        given = request.headers.get("content-type", "")
        if "json" not in given:  # curl's --data alone, or a foreign web page
            text = f"expected JSON with the header `Content-Type: application/json`, got {given or 'no such header'}"
            return respond(ApiError(400, text, code="invalid_request"))
        # Of something that may be of several types, what is wrong with the one that came nearest.
        nearest = max(error.errors(), key=lambda found: len(found["loc"]))
        place = ".".join(str(part) for part in nearest["loc"][1:] if not _names_a_type(part))
        if nearest["type"] == "json_invalid":
            place = ""
        message = str(nearest["msg"]).removeprefix("Value error, ")
        text = f"{place}: {message}" if place else message
        return respond(ApiError(400, text, code="invalid_request", param=place or None))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ApiError):  # raised while the body was read
            return respond(cause)
        headers = None if error.headers is None else dict(error.headers)
        return respond(ApiError(error.status_code, str(error.detail), headers=headers))

    # By name: what reaches the handler of `Exception` is raised again behind it, and uvicorn logs it as a bug.
    @app.exception_handler(ApiError)
    @app.exception_handler(MegaContextError)
    @app.exception_handler(Exception)
    async def other(_: Request, error: Exception) -> JSONResponse:
        return respond(api_error(error))


def _names_a_type(part: str | int) -> bool:
    """Whether a part of a place is one that pydantic adds to say which member of a union it means."""
    return isinstance(part, str) and (part == "str" or part.startswith("list["))
