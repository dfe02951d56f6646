"""The memories in a directory: opened on demand, one request at a time each, the one used longest ago closed first."""

from __future__ import annotations

import asyncio
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from ..config import MemoryConfig
from ..errors import InputError, MegaContextError
from ..model import LoadedModel
from ..session import Session
from .errors import NO_RETRY, ApiError, logger
from .history import History
from .settings import ServeSettings

# Share of the slots that instructions may take: they stay at full detail for good.
INSTRUCTIONS_SHARE = 8


class Work(Protocol):
    """Runs a function in the one thread that touches models and memories."""

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]: ...


class OpenMemory:
    """A session, and the turns that it holds. head_is_new: the memory was made for the request that comes next, with
    its instructions."""

    def __init__(self, session: Session, head_is_new: bool) -> None:
        self.session, self.head_is_new = session, head_is_new
        self.history = History(session.tree, session.model)


class Memories:
    """See the module. All methods run on the event loop; sessions are touched through `work` alone."""

    def __init__(self, settings: ServeSettings, model: LoadedModel, work: Work) -> None:
        self.settings, self.model, self._work = settings, model, work
        self._open: OrderedDict[str, OpenMemory] = OrderedDict()  # least recently used first
        self._busy: set[str] = set()
        # A lock lives while a request holds it or waits for it.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._places = asyncio.Semaphore(settings.max_open)

    @asynccontextmanager
    async def use(self, folder: str, instructions: str | None) -> AsyncIterator[OpenMemory]:
        """The memory in `folder`, for this request alone. instructions: the system prompt of one that is new."""
        lock = self._locks.setdefault(folder, asyncio.Lock())
        async with lock, self._places:
            self._busy.add(folder)
            try:
                memory = self._open.get(folder)
                if memory is None:
                    await self._make_place()
                    memory = self._open[folder] = await self._work(self._open_memory, folder, instructions)
                self._open.move_to_end(folder)
                yield memory
            finally:
                self._busy.discard(folder)

    async def close(self) -> None:
        """Save and close all. Nobody may be using one."""
        while self._open:
            await self._close_one(next(iter(self._open)))

    async def _make_place(self) -> None:
        while len(self._open) >= self.settings.max_open:
            # There is one: no more than `max_open` requests are here, and this one has no open memory yet.
            await self._close_one(next(folder for folder in self._open if folder not in self._busy))

    async def _close_one(self, folder: str) -> None:
        memory = self._open.pop(folder)
        try:
            await self._work(memory.session.close)
        except MegaContextError as error:  # of the snapshot: the text is safe, and whoever asks now is not concerned
            logger.error("%s", error)

    def _open_memory(self, folder: str, instructions: str | None) -> OpenMemory:
        """In the worker's thread."""
        root, session = self.settings.root, dict(self.settings.session)
        new = not (root / folder).exists()
        if new:
            if sum(entry.is_dir() for entry in root.iterdir()) >= self.settings.max_memories:
                raise ApiError(
                    429,
                    f"this server keeps at most {self.settings.max_memories} memories; use one that exists",
                    code="memory_limit_reached",
                    headers=NO_RETRY,
                )
            if instructions is not None:
                session["system_prompt"] = instructions
                check_instructions(instructions, self.model, session.get("budget"))
        return OpenMemory(Session.open(root / folder, self.model, **session), new and instructions is not None)


def check_instructions(text: str, model: LoadedModel, budget: int | None) -> None:
    """Refuse instructions that would leave too few slots for what is said."""
    limit = (budget or MemoryConfig().budget) // INSTRUCTIONS_SHARE
    count = len(model.chat.system_ids(text))
    if count > limit:
        raise InputError(f"messages: the system message has {count} tokens; expected at most {limit}")
