"""A memory of twenty facts, and a question for each."""

from __future__ import annotations

from typing import Any

from mc_runtime import Session
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
