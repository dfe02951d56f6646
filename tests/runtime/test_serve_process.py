"""The real process, the real model: SIGTERM in the middle of a stream, and a start that finds everything."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from mc_runtime.serve.names import folder_of
from mc_runtime.tree import Tree

MODEL = "smollm2-135m"
TOKEN = "an example"


@contextmanager
def serving(root: Path) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """`mc serve` and a client, when it listens."""
    environment = os.environ | {"MC_SERVE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mc_runtime.cli", "serve", root, "--port", "0", "--budget", "512"],
        stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=environment,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        port = None
        for line in process.stderr:
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                port = found[1]
                break
        assert port, "the server ended before it listened"
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0, timeout=120) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_stream_that_is_ended_by_sigterm_is_kept_and_goes_on(tmp_path: Path) -> None:
    messages: list[dict[str, str]] = [{"role": "user", "content": "Tell me a long story about the town of Larnfeld."}]
    with serving(tmp_path / "root") as (process, client):
        pieces, reason = [], None
        stream = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            user="ann",
            max_tokens=4000,
            stream=True,  # type: ignore[arg-type]
        )
        for chunk in stream:
            choice = chunk.choices[0]
            pieces.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
            if len(pieces) == 12:
                process.send_signal(signal.SIGTERM)
        # The stream came to its regular end, and so did the process.
        assert reason == "length"
        assert 12 <= len(pieces) < 200
        assert process.wait(60) == -signal.SIGTERM
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    answer = "".join(pieces)
    with Tree.open(tmp_path / "root" / folder_of("ann"), mode="r") as tree:
        tree.verify()
        assert [d.kind for d in tree.documents()] == ["system", "user", "assistant"]
        assert tree.state("session") is not None  # saved, not only safe
    messages += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Which town was it? Answer in one word."},
    ]
    with serving(tmp_path / "root") as (_, client):
        result = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            user="ann",
            max_tokens=16,  # type: ignore[arg-type]
        )
        assert str(result.choices[0].message.content).strip()
        usage = result.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        # All but the new question was there.
        assert usage.prompt_tokens - (usage.prompt_tokens_details.cached_tokens or 0) < 30
    with Tree.open(tmp_path / "root" / folder_of("ann"), mode="r") as tree:
        tree.verify()
        assert [d.kind for d in tree.documents()] == ["system", *["user", "assistant"] * 2]
