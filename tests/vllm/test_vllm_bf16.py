"""bf16 in both engines, which round at different places: how many answers are the same, and where they part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from village import ANSWER, PROMPTS, SETTINGS, fill

from mc_runtime.engines import NativeEngine
from mc_runtime.engines.vllm import VLLMEngine
from mc_runtime.model import LoadedModel, load_model
from mc_runtime.sampling import SamplingParams
from mc_runtime.served import ServedSession
from mc_runtime.served_turns import ServedTurn

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]  # on a busy machine too
# In nats: logits have a range of about 30, and bf16 has 8 bits of them.
MARGIN = 0.5


@pytest.fixture(scope="module")
def model(smollm2: LoadedModel) -> LoadedModel:
    return load_model(dtype=torch.bfloat16, device="cpu")


@pytest.fixture(scope="module")
def engine(installed: None, model: LoadedModel) -> VLLMEngine:
    return VLLMEngine.load(model, max_model_len=1024, max_num_seqs=20, enforce_eager=True, disable_log_stats=True)


@torch.inference_mode()
def test_answers_part_where_two_tokens_are_about_as_likely(
    engine: VLLMEngine, model: LoadedModel, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    native = NativeEngine(model.decoder)
    with ServedSession.open(tmp_path / "memory", native, model, **SETTINGS) as session:
        fill(session)
        contexts = []
        for prompt in PROMPTS:  # each on a branch of its own, refocused on the question
            turn = ServedTurn(model, session.context.fork(), session.focus.branch(), None)
            turn.read(prompt)
            assert (turn.context.entries.levels > 0).sum() > 20
            contexts.append(turn.context.rows())
    eos_ids = model.tokenizer.eos_ids
    ours, theirs = (e.complete(contexts, SamplingParams(), count=ANSWER, eos_ids=eos_ids) for e in (native, engine))
    same = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    record_property("same_answers", f"{same} of {len(PROMPTS)}")
    print(f"\nthe same greedy answers in bf16: {same} of {len(PROMPTS)}")
    apart = []
    for rows, mine, other in zip(contexts, ours, theirs, strict=True):
        if mine == other:
            continue
        pairs = enumerate(zip(mine, other, strict=False))  # one may have ended
        common = next((i for i, (a, b) in pairs if a != b), min(len(mine), len(other)))
        if common:
            rows = torch.cat((rows, native.embed(torch.tensor([mine[:common]]))[0]))
        logits = native.prefill(rows, room=0).logits.float()
        best = logits.topk(2).values
        apart.append((common, round(float(best[0] - best[1]), 3)))
    print(f"(token, how much likelier the native engine's best is than its second, nats): {apart}")
    assert all(margin < MARGIN for _, margin in apart)
    assert same >= len(PROMPTS) // 2
