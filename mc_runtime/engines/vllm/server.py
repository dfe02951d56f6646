"""A vLLM server as an engine."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mc_runtime.engines.prompt import PromptEngine
from mc_runtime.errors import InputError, ModelError
from mc_runtime.model import Decoder
from mc_runtime.sampling import SamplingParams

from .local import without_end
from .transfer import PARAMETER, check_read


class VLLMServerEngine(PromptEngine):
    """Continues contexts through `/v1/completions` of `vllm serve MODEL --enable-prompt-embeds`, which runs the
    decoder's own model. Replicas behind one address serve it as well as one does: a request holds the whole context.

    url: of the API, with its `/v1`. model: the name it is served by; by default the only one. api_key: see vLLM's
    `--api-key`. timeout: seconds for one request. Raises ModelError where there is no such server, and without
    the package `openai`.
    """

    name = "vllm-server"

    def __init__(
        self, decoder: Decoder, url: str, *, model: str | None = None, api_key: str = "none", timeout: float = 600.0
    ) -> None:
        super().__init__(decoder)
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ModelError(f"engine: {error}: pip install 'megacontext[vllm]'") from error
        self._client = OpenAI(base_url=url, api_key=api_key, timeout=timeout)
        served = {card.id: card for card in self._ask(self._client.models.list).data}
        if model is None and len(served) == 1:
            (model,) = served
        if model not in served:
            raise ModelError(f"model: expected one that {url} serves ({', '.join(served)}), got {model!r}")
        self.url, self.model = url, model
        self.max_length: int = getattr(served[model], "max_model_len", None) or decoder.config.max_positions

    def check_room(self, entries: int, room: int) -> None:
        super().check_room(entries, room)
        if entries + room > self.max_length:
            raise InputError(
                f"room: {entries} entries and {room} tokens behind them are more than the server's max_model_len, "
                f"{self.max_length}; give a smaller budget or serve with a larger one"
            )

    def _complete(
        self, contexts: Sequence[Tensor], params: SamplingParams, count: int, eos_ids: Collection[int]
    ) -> list[list[int]]:
        answer = self._answer(count, _sampling(params), _vllm_sampling(params, eos_ids) | _vectors(contexts))
        return [without_end(choice.token_ids, eos_ids) for choice in self._choices(answer, len(contexts))]

    def continue_from(
        self, ids: list[int], file: str, params: SamplingParams, *, count: int, eos_ids: Collection[int] = ()
    ) -> list[int]:
        """See `VLLMEngine.continue_from`."""
        transfer = {"kv_transfer_params": {PARAMETER: file}, "cache_salt": file}
        answer = self._answer(count, _sampling(params), _vllm_sampling(params, eos_ids) | transfer, prompt=ids)
        (choice,) = self._choices(answer, 1)
        check_read(getattr(answer, "kv_transfer_params", None), len(ids) - 1, choice.finish_reason)
        return without_end(choice.token_ids, eos_ids)

    def next_logits(self, rows: Tensor) -> Tensor:
        """Raises ModelError for a server that does not report the whole vocabulary (`--max-logprobs -1`)."""
        vocab = self.config.vocab_size
        report = {"temperature": 0.0, "logprobs": vocab}
        answer = self._answer(1, report, _vectors([rows]) | {"return_tokens_as_token_ids": True})
        (choice,) = self._choices(answer, 1)
        (row,) = choice.logprobs.top_logprobs
        logits = torch.full((vocab,), -torch.inf)
        logits[torch.tensor([int(name.removeprefix("token_id:")) for name in row])] = torch.tensor([*row.values()])
        return logits.to(self.device)

    def _answer(
        self, count: int, sampling: dict[str, Any], extra: dict[str, Any], prompt: list[int] | None = None
    ) -> Any:
        # Whatever the server would take from the model's generation_config is said here. What ends an answer is said
        # by `stop_token_ids` alone.
        body = {"return_token_ids": True, "ignore_eos": True, "repetition_penalty": 1.0, "min_p": 0.0}
        return self._ask(
            self._client.completions.create,
            model=self.model, prompt=prompt, max_tokens=count, extra_body=body | extra, **sampling,
        )  # fmt: skip

    def _choices(self, answer: Any, count: int) -> list[Any]:
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        if len(choices) != count or any(getattr(choice, "token_ids", None) is None for choice in choices):
            raise ModelError(f"{self.url}: expected {count} answers with token ids; is it a vLLM server?")
        return choices

    def _ask(self, call: Any, **arguments: Any) -> Any:
        from openai import APIError

        try:
            return call(**arguments)
        except APIError as error:
            raise ModelError(f"{self._client.base_url}: {type(error).__name__}: {error}") from error


def _sampling(params: SamplingParams) -> dict[str, Any]:
    return {"temperature": params.temperature, "top_p": params.top_p, "seed": params.seed}


def _vllm_sampling(params: SamplingParams, eos_ids: Collection[int]) -> dict[str, Any]:
    return {"top_k": params.top_k, "stop_token_ids": sorted(eos_ids)}


def _vectors(contexts: Sequence[Tensor]) -> dict[str, Any]:
    return {"prompt_embeds": [encoded(rows) for rows in contexts]}


def encoded(rows: Tensor) -> str:
    """As vLLM's server reads them: a tensor file in base64."""
    file = io.BytesIO()
    torch.save(rows, file)
    return base64.b64encode(file.getvalue()).decode("ascii")
