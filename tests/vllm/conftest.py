"""vLLM over SmolLM2 in fp32, and what the native engine says. `make vllm-test` runs these where vLLM is installed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from village import ANSWER, PROMPTS, SETTINGS, fill

from mc_runtime import Session
from mc_runtime.engines.vllm import VLLMEngine
from mc_runtime.model import LoadedModel, load_model


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load_model(dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def installed() -> None:
    """vLLM, set up for a small machine without a network."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",  # GiB
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    pytest.importorskip("vllm.entrypoints.llm", reason="vLLM is not installed: make vllm-test", exc_type=ImportError)


@pytest.fixture(scope="session")
def engine(installed: None, smollm2: LoadedModel) -> VLLMEngine:
    return VLLMEngine.load(
        smollm2, max_model_len=1024, max_num_seqs=20, enforce_eager=True, max_logprobs=-1, disable_log_stats=True
    )


@pytest.fixture(scope="session")
def native_answers(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the native engine says: to twenty prompts at once, and in two turns."""
    exact = {**SETTINGS, "refresh": "full", "refresh_decode": "full"}
    with Session.open(tmp_path_factory.mktemp("native") / "memory", smollm2, **exact) as session:
        fill(session)
        batch = session.generate(PROMPTS, max_new_tokens=ANSWER)
        turns = [session.generate(prompt, max_new_tokens=ANSWER) for prompt in PROMPTS[:2]]
        return {"batch": batch, "turns": turns, "keys": session.context.entries.keys.tolist()}
