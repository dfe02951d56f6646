"""What this process and the connector in a vLLM (`connector.py`) say to each other about a request."""

from __future__ import annotations

from typing import Any

from mc_runtime.errors import ModelError

# The key of `kv_transfer_params`. Of a request: the file of its keys and values. Of the answer: {"entries": n}, how
# many were read from it, or {"error": text}.
PARAMETER = "megacontext"


def check_read(given: Any, entries: int, finish_reason: str | None) -> None:
    """given, finish_reason: `kv_transfer_params` of an answer, and why it ended. Raises ModelError unless the connector
    has read so many entries: without them vLLM answers all the same, from placeholders, or ends the request."""
    if finish_reason == "error":
        raise ModelError(f"vLLM did not read the context's {entries} entries: the file was gone when a worker read it")
    said = (given or {}).get(PARAMETER) or {"error": "there is no connector; start it with transfer_config(directory)"}
    if said.get("entries") != entries:
        raise ModelError(f"vLLM did not read the context's {entries} entries: {said.get('error', said)}")
