"""vLLM in this process against the native engine: logits, greedy answers, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from village import ANSWER, PROMPTS, SETTINGS, fill

from mc_runtime.engines import NativeEngine
from mc_runtime.engines.vllm import VLLMEngine
from mc_runtime.errors import InputError, ModelError
from mc_runtime.model import Decoder, LoadedModel
from mc_runtime.sampling import SamplingParams
from mc_runtime.served import ServedSession

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@torch.no_grad()
def test_logits_of_tokens_and_vectors(engine: VLLMEngine, smollm2: LoadedModel) -> None:
    """fp32 on both sides: they differ by the order of sums alone."""
    rows = engine.embed(torch.tensor([smollm2.tokenizer.encode("The keeper of the lighthouse at Sandvik is")]))[0]
    rows[3:5] = rows[:3].mean(0)  # as a gist is: no token has this vector
    native, other = (e.prefill(rows, room=2) for e in (NativeEngine(smollm2.decoder), engine))
    for token in (253, None):
        assert (native.logits.log_softmax(0) - other.logits.log_softmax(0)).abs().max() < 1e-3
        if token is not None:
            native.decode(token)
            other.decode(token)


def test_twenty_greedy_answers_are_the_native_ones(
    engine: VLLMEngine, smollm2: LoadedModel, native_answers: dict[str, Any], tmp_path: Path
) -> None:
    """Each on a Working Context of its own, which is refocused after 32 tokens; then two turns that are remembered."""
    with ServedSession.open(tmp_path / "memory", engine, smollm2, **SETTINGS) as session:
        fill(session)
        assert session.generate(PROMPTS, max_new_tokens=ANSWER) == native_answers["batch"]
        assert (session.context.entries.levels > 0).sum() > 20
        turns = [session.generate(prompt, max_new_tokens=ANSWER) for prompt in PROMPTS[:2]]
        assert turns == native_answers["turns"]
        assert session.context.entries.keys.tolist() == native_answers["keys"]


def test_ends_and_seeds(engine: VLLMEngine, smollm2: LoadedModel) -> None:
    ids = smollm2.chat.user_turn_ids("Count from one to nine.")
    rows = engine.embed(torch.tensor([ids]))[0]
    greedy = engine.complete([rows, rows[:-3]], SamplingParams(), count=6)
    assert greedy == NativeEngine(smollm2.decoder).complete([rows, rows[:-3]], SamplingParams(), count=6)
    (ended,) = engine.complete([rows], SamplingParams(), count=6, eos_ids=[greedy[0][2]])
    assert ended == greedy[0][: greedy[0].index(greedy[0][2])]
    drawn = [engine.complete([rows], SamplingParams(temperature=2.0, seed=s), count=12) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    top = engine.complete([rows], SamplingParams(temperature=2.0, seed=1, top_k=1), count=6)
    assert top[0] == greedy[0]


def test_what_does_not_fit_is_refused(engine: VLLMEngine, smollm2: LoadedModel) -> None:
    width = smollm2.config.embed_dim
    with pytest.raises(InputError, match="more than vLLM's max_model_len, 1024"):
        engine.complete([torch.zeros(1000, width)], SamplingParams(), count=25)
    with pytest.raises(ModelError, match=r"the decoder's hidden size, 32, got 576"):
        VLLMEngine(Decoder.random(_tiny(smollm2)), engine.llm)
    engine.max_logprobs, kept = 20, engine.max_logprobs
    try:
        with pytest.raises(ModelError, match="max_logprobs=-1"):
            engine.prefill(torch.zeros(1, width))
    finally:
        engine.max_logprobs = kept


def _tiny(model: LoadedModel) -> Any:
    from dataclasses import replace

    return replace(model.config, embed_dim=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, ffn_dim=32)
