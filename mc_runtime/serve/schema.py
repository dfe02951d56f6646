"""What a chat request may say, and the objects that answer it."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..sampling import SamplingParams

# Would change the answer and cannot be done: refused unless it has one of these values. What else is not known here
# (`metadata`, `store`, `service_tier`, ...) changes nothing and is ignored.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
}
_STRICT = ConfigDict(strict=True, extra="ignore")


class TextPart(BaseModel):
    model_config = _STRICT
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = _STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(BaseModel):
    model_config = _STRICT
    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The body of `/v1/chat/completions`."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str
    messages: list[Message] = Field(min_length=1, max_length=10_000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise ValueError(f"{name}: this server cannot do that; leave it out")
        last = self.messages[-1]
        if last.role != "user" or not last.text.strip():
            raise ValueError("messages: expected the last one to be the user's, with text")
        return self

    def sampling(self, default: SamplingParams) -> SamplingParams:
        """What is asked for, with the server's values where nothing is. Raises InputError for values out of range."""
        asked = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed")}
        limit = self.max_completion_tokens or self.max_tokens
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        chosen = {name: getattr(default, name) if value is None else value for name, value in asked.items()}
        return SamplingParams(
            max_new_tokens=limit or default.max_new_tokens,
            stop=default.stop if stop is None else tuple(stop),
            **chosen,
        )


class Usage(BaseModel):
    """prompt: tokens of all messages of the request. read: those of them that the memory did not hold before."""

    prompt: int
    read: int
    completion: int

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.prompt - self.read},
        }


class Envelope:
    """The fields that all objects of one completion share."""

    def __init__(self, id: str, model: str, fingerprint: str) -> None:
        self._shared = {"id": id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    def completion(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._shared, "object": "chat.completion", "choices": [choice], "usage": usage.to_json()}

    def chunk(
        self, delta: dict[str, Any] | None, finish_reason: str | None = None, usage: Usage | None = None
    ) -> dict[str, Any]:
        """One event of a stream; without delta the one that carries the usage."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {
            **self._shared,
            "object": "chat.completion.chunk",
            "choices": [] if delta is None else [choice],
            "usage": None if usage is None else usage.to_json(),
        }
