"""vLLM over SmolLM2 in fp32, and a memory of twenty facts. `make vllm-test` runs these where vLLM is installed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from mc_runtime import Session
from mc_runtime.engines.vllm import VLLMEngine
from mc_runtime.model import LoadedModel, load_model
from mc_runtime.served import DEFAULTS, ServedSession

NAMES = (
    "Ingrid Holm", "Tomas Berg", "Anna Lund", "Peter Dahl", "Maria Sand", "Erik Vik", "Clara Nes", "Oskar Lie",
    "Greta Moe", "Jonas Fjeld", "Helga Strand", "Nils Aas", "Sofie Bakke", "Lars Haug", "Ida Krog", "Martin Ruud",
    "Vera Eide", "Simon Foss", "Thea Grov", "Henrik Sol",
)  # fmt: skip
TRADES = (
    "baker", "smith", "doctor", "teacher", "fisherman", "carpenter", "tailor", "miller", "postman", "shepherd",
    "painter", "sailor", "gardener", "judge", "priest", "butcher", "weaver", "potter", "clerk", "hunter",
)  # fmt: skip
PROMPTS = [f"Who is the {trade} of the village?" for trade in TRADES]
FILLER = "The sea was calm that week and nothing else happened; people mended their nets, and it rained at night. "
# Blocks, recent tokens and slots such that most of the history stands in gists, and answers are longer than a block.
SETTINGS: dict[str, Any] = {**DEFAULTS, "budget": 288, "recent_tokens": 64}
ANSWER = 36


def village() -> str:
    facts = (f"{name} is the {trade} of the village. " for name, trade in zip(NAMES, TRADES, strict=True))
    return "".join(fact + FILLER * 2 for fact in facts)


def fill(session: Session | ServedSession) -> None:
    session.ingest(village(), title="the village")


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
