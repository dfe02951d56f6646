"""vLLM's OpenAI-compatible server against the native engine, and the page of docs/ that says how to set vLLM up."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from village import PROMPTS, SETTINGS, fill, village

import mc_runtime.model
from mc_runtime import Session
from mc_runtime.engines import NativeEngine
from mc_runtime.engines.vllm import VLLMServerEngine
from mc_runtime.engines.vllm.handover import complete_from_cache, transfer_config
from mc_runtime.engines.vllm.transfer import check_read
from mc_runtime.errors import InputError, ModelError
from mc_runtime.model import LoadedModel
from mc_runtime.sampling import SamplingParams
from mc_runtime.served import ServedSession

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
READY = 400  # seconds that a server may take to load on a busy machine
KEY = "a key"
PAGE = Path(__file__).parents[2] / "docs" / "engines" / "vllm-engine.md"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def url(installed: None, smollm2: LoadedModel, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own on the loopback interface, with our connector, which ends with the module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2.directory),
        "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enable-prompt-embeds", "--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager",
        "--max-logprobs", "-1", "--api-key", KEY, "--kv-transfer-config", json.dumps(transfer_config(files)),
    ]  # fmt: skip
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        start = time.monotonic()
        while not _ready(f"http://127.0.0.1:{port}/health"):
            text = f"the server did not come up:\n{log.read_text()[-4000:]}"
            assert server.poll() is None, text
            assert time.monotonic() - start < READY, text
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@torch.no_grad()
def test_a_server_says_what_the_native_engine_says(url: str, smollm2: LoadedModel, tmp_path: Path) -> None:
    engine, native = VLLMServerEngine(smollm2.decoder, url, api_key=KEY), NativeEngine(smollm2.decoder)
    assert (engine.model, engine.max_length) == ("smollm2", 1024)
    ids = smollm2.chat.user_turn_ids("Count from one to nine.")
    rows = engine.embed(torch.tensor([ids]))[0]
    contexts = [rows, rows[:-3], torch.cat((rows, rows[3:6].mean(0, keepdim=True)))]
    greedy = native.complete(contexts, SamplingParams(), count=8)
    assert engine.complete(contexts, SamplingParams(), count=8) == greedy
    (ended,) = engine.complete([rows], SamplingParams(), count=6, eos_ids=[greedy[0][2]])
    assert ended == greedy[0][: greedy[0].index(greedy[0][2])]
    logits = [e.prefill(rows, room=0).logits.log_softmax(0) for e in (native, engine)]
    assert (logits[0] - logits[1]).abs().max() < 1e-3
    said = []
    for one in (native, engine):
        with ServedSession.open(tmp_path / one.name, one, smollm2, **SETTINGS) as session:
            fill(session)
            said.append(session.generate(PROMPTS[0], max_new_tokens=6))
    assert said[0] == said[1]


@torch.inference_mode()
def test_pooled_gists_through_a_servers_connector(url: str, smollm2: LoadedModel, files: Path, tmp_path: Path) -> None:
    """The native engine's greedy tokens, and what comes of files that cannot be read: the server goes on."""
    from test_vllm_connector import native

    engine = VLLMServerEngine(smollm2.decoder, url, api_key=KEY)
    with Session.open(tmp_path / "memory", smollm2, budget=288, recent_tokens=64, gist_bias=0.0) as session:
        fill(session)
        session.generate(PROMPTS[0], max_new_tokens=3)
        assert (session.context.entries.levels > 0).sum() > 20
        said = complete_from_cache(engine, session.context, files, SamplingParams(), count=8)
        assert said == native(session, 8)
        # Values that no reading of a text would give: what counts is what is in the file.
        session.context.cache.v[:, 0, :, session.context.slots[64:128]] = 0
        with pytest.raises(ModelError, match=r"did not read the context's \d+ entries: .* cannot be read: FileNot"):
            complete_from_cache(engine, session.context, tmp_path, SamplingParams(), count=1)  # not the server's folder
        other = "0" * 32 + ".safetensors"
        save_file({name: torch.zeros(2, 3, 4, 64) for name in "kv"}, str(files / other))
        wrong = {other: r"expected k and v \[30, 3, n, 64\] F32, got", "x.safetensors": "expected a name of 32"}
        for name, message in wrong.items():
            with pytest.raises(ModelError, match=message):
                engine.continue_from([1] * 5, name, SamplingParams(), count=1)
        said = complete_from_cache(engine, session.context, files, SamplingParams(), count=8)
        assert said == native(session, 8)
        assert [path.name for path in files.iterdir()] == [other]


def test_a_vllm_without_the_connector_is_told_by_its_answer() -> None:
    for answer in (None, {}, {"do_remote_prefill": True}):
        with pytest.raises(ModelError, match="did not read the context's 3 entries: there is no connector"):
            check_read(answer, 3, "length")
    with pytest.raises(ModelError, match="3 entries"):
        check_read({"megacontext": {"entries": 2}}, 3, "length")
    check_read({"megacontext": {"entries": 3}}, 3, "length")
    with pytest.raises(ModelError, match="the file was gone when a worker read it"):
        check_read(None, 3, "error")


def test_the_page_runs(
    url: str, smollm2: LoadedModel, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Every Python block of docs/engines/vllm-engine.md, in order; the server's address, key and folder are ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mc_runtime.model, "load_model", lambda: smollm2)  # the server's precision
    Path("book.txt").write_text(village())
    source, names = PAGE.read_text(encoding="utf-8"), dict[str, Any]()
    for theirs, ours in (("http://127.0.0.1:8000/v1", url), ('"..."', repr(KEY)), ("/shared/contexts", str(files))):
        assert theirs in source
        source = source.replace(theirs, ours)
    blocks = re.findall(r"^```python\n(.*?)^```$", source, re.M | re.S)
    assert len(blocks) == source.count("```python") == 3
    for code in blocks:
        exec(compile(code, str(PAGE), "exec"), names)
        shown = capsys.readouterr().out
        assert ("print(" in code) == bool(shown.strip())
    assert len(names["session"].turns) == 1
    assert isinstance(names["engine"], VLLMServerEngine)
    with Session.open("native", smollm2, gist_bias=0.0) as session:
        session.ingest("book.txt")
        answer = session.generate("Who keeps the lighthouse?", max_new_tokens=17)
    assert names["said"] + smollm2.tokenizer.decode(names["ids"]) == answer
    assert len(names["ids"]) > 2
    names["local"].llm.llm_engine.engine_core.shutdown()


def test_what_a_server_refuses(url: str, smollm2: LoadedModel) -> None:
    with pytest.raises(ModelError, match="AuthenticationError"):
        VLLMServerEngine(smollm2.decoder, url, api_key="another")
    with pytest.raises(ModelError, match=r"expected one that .* serves \(smollm2\), got 'llama'"):
        VLLMServerEngine(smollm2.decoder, url, api_key=KEY, model="llama")
    engine = VLLMServerEngine(smollm2.decoder, url, api_key=KEY)
    with pytest.raises(InputError, match="more than the server's max_model_len, 1024"):
        engine.complete([torch.zeros(1000, smollm2.config.embed_dim)], SamplingParams(), count=25)
    with pytest.raises(ModelError, match="BadRequestError"):
        engine._complete([torch.zeros(4, 8)], SamplingParams(), 4, [])  # another model's vectors


def test_no_server(smollm2: LoadedModel, installed: None) -> None:
    with pytest.raises(ModelError, match="APIConnectionError"):
        VLLMServerEngine(smollm2.decoder, "http://127.0.0.1:9/v1", timeout=2)
