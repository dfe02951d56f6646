"""Gists that are keys and values in vLLM: a Working Context of pooled gists goes through the KV connector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from village import fill

from mc_runtime import Session
from mc_runtime.engines.vllm import VLLMEngine
from mc_runtime.errors import InputError, ModelError
from mc_runtime.model import LoadedModel
from mc_runtime.sampling import SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ASKED = ("Who is the baker of the village?", "Who is the potter of the village?")


def native(session: Session, count: int) -> list[int]:
    """The native engine's greedy continuation of the session's context."""
    context = session.context
    branch = context.fork(context.cache.widened(context.cache.capacity + count))
    hidden = branch.run(np.array([branch.used - 1])).hidden[0, -1]  # the last token, which vLLM reads too
    tokens = list[int]()
    for _ in range(count):
        tokens.append(int(session.engine.logits(hidden).argmax()))
        hidden = branch.append(tokens[-1:]).hidden[0, -1]
    return tokens


@torch.inference_mode()
def test_pooled_gists_through_the_connector(
    installed: None, smollm2: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mc_runtime.engines.vllm.connector import WorkingContextConnector
    from mc_runtime.engines.vllm.handover import complete_from_cache, transfer_config

    files = tmp_path / "files"
    files.mkdir()
    engine = VLLMEngine.load(
        smollm2, max_model_len=1024, max_num_seqs=2, enforce_eager=True, disable_log_stats=True,
        kv_transfer_config=transfer_config(files),
    )  # fmt: skip
    settings = {"budget": 288, "recent_tokens": 64, "gist_bias": 0.0, "policy": "retrieval"}
    with Session.open(tmp_path / "memory", smollm2, **settings) as session:
        fill(session)
        for prompt in ASKED:
            session.generate(prompt, max_new_tokens=3)
            assert (session.context.entries.levels > 0).sum() > 20
            said = complete_from_cache(engine, session.context, files, SamplingParams(), count=12)
            assert said == native(session, 12)
            assert not list(files.iterdir())
        # The file is gone between scheduler and worker: that request ends, and the engine goes on.
        load = WorkingContextConnector.start_load_kv

        def gone(*args: Any, **kw: Any) -> None:
            for file in files.iterdir():
                file.unlink()
            load(*args, **kw)

        with monkeypatch.context() as patch:
            patch.setattr(WorkingContextConnector, "start_load_kv", gone)
            with pytest.raises(ModelError, match="the file was gone when a worker read it"):
                complete_from_cache(engine, session.context, files, SamplingParams(), count=12)
        assert complete_from_cache(engine, session.context, files, SamplingParams(), count=12) == said
        # Values that no reading of a text would give: what counts is what is in the file.
        session.context.cache.v[:, 0, :, session.context.slots[64:128]] = 0
        assert complete_from_cache(engine, session.context, files, SamplingParams(), count=12) == native(session, 12)
        with pytest.raises(InputError, match="directory: expected that of an LLM"):
            complete_from_cache(engine, session.context, tmp_path, SamplingParams(), count=1)
        with pytest.raises(InputError, match="more than vLLM's max_model_len"):
            complete_from_cache(engine, session.context, files, SamplingParams(), count=1000)
