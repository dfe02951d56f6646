"""Requests under way. Each runs as a task of its own, so that what a client does (leaving, too) cannot break off the
model in the middle of a token; models and memories are touched in one thread, by turns: a token of each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, cast

from ..model import LoadedModel
from ..sampling import SamplingParams
from ..tree import Document
from .errors import NO_RETRY, ApiError, api_error
from .history import Conversation
from .memories import Memories, OpenMemory, check_instructions
from .schema import Usage
from .settings import ServeSettings


class Completion:
    """One request. Iterate over the pieces of its answer; `finish_reason` and `usage` are there afterwards."""

    def __init__(self, folder: str, conversation: Conversation, sampling: SamplingParams) -> None:
        self.folder, self.conversation, self.sampling = folder, conversation, sampling
        self.finish_reason = ""
        self.usage = Usage(prompt=0, read=0, completion=0)
        self.stopped = False
        self._pieces: asyncio.Queue[str | ApiError | None] = asyncio.Queue()

    def stop(self) -> None:
        """The client has gone: what is said so far is kept, no more is."""
        self.stopped = True

    def put(self, piece: str | ApiError | None) -> None:
        """A piece, an error, or None for the end."""
        self._pieces.put_nowait(piece)

    async def next(self) -> str | None:
        """The next piece, None at the end. Raises ApiError."""
        piece = await self._pieces.get()
        if isinstance(piece, ApiError):
            raise piece
        return piece

    async def __aiter__(self) -> AsyncIterator[str]:
        while (piece := await self.next()) is not None:
            yield piece


class Service:
    """Answers chat requests from the memories of a directory. Made and used on one event loop."""

    def __init__(self, settings: ServeSettings, model: LoadedModel) -> None:
        self.settings, self.model = settings, model
        self.closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mc-model")
        self.memories = Memories(settings, model, self._work)
        self._tasks: set[asyncio.Task[None]] = set()
        settings.make_root()

    async def _work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def start(self, folder: str, conversation: Conversation, sampling: SamplingParams) -> Completion:
        """Begin to answer. Raises ApiError if too many requests are under way, or the server is closing."""
        if self.closing:
            raise _closing()
        if len(self._tasks) >= self.settings.max_requests:
            raise ApiError(
                429,
                f"{self.settings.max_requests} requests are under way; try again",
                code="too_many_requests",
                headers={"retry-after": "1"},
            )
        completion = Completion(folder, conversation, sampling)
        task = asyncio.create_task(self._run(completion))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return completion

    def close_soon(self) -> None:
        """Take no more requests, and end the answers under way after their present token. Safe in a signal handler."""
        self.closing = True

    async def close(self) -> None:
        """`close_soon`, wait for the answers under way, save and close the memories."""
        self.close_soon()
        await asyncio.gather(*self._tasks)
        await self.memories.close()
        self._thread.shutdown()

    async def _run(self, completion: Completion) -> None:
        try:
            async with self.memories.use(completion.folder, completion.conversation.instructions) as memory:
                if self.closing:
                    raise _closing()
                if not completion.stopped:  # while it waited
                    await self._answer(memory, completion)
            completion.put(None)
        except Exception as error:
            completion.put(api_error(error))

    async def _answer(self, memory: OpenMemory, completion: Completion) -> None:
        stream = await self._work(self._prepare, memory, completion)
        try:
            while not (completion.stopped or self.closing):
                piece = await self._work(next, stream, None)
                if piece is None:
                    break
                completion.put(piece)
        finally:
            await self._work(self._finish, memory, completion, stream)

    # -- in the worker's thread -------------------------------------------------------------------------------------

    def _prepare(self, memory: OpenMemory, completion: Completion) -> Generator[str, None, None]:
        """Bring what the request knows and the memory does not into it; the answer to its question, not begun yet."""
        session, history, conversation = memory.session, memory.history, completion.conversation
        history.update()
        reading = history.reading(conversation)
        text = conversation.instructions
        held = None if text is None else history.instructions(text)
        if text is not None:
            count = len(self.model.chat.system_ids(text))
            reading.total += count
            if held is None:
                check_instructions(text, self.model, session.config.budget)
                reading.read += count
        end = len(self.model.chat.assistant_end_ids())
        room = self.settings.max_memory_tokens - session.tree.length - reading.read - end
        if room < 1:
            raise ApiError(
                413,
                f"the memory holds {session.tree.length} tokens and this request adds {reading.read}; it may hold "
                f"{self.settings.max_memory_tokens}",
                code="memory_full",
            )
        # The head of a memory that was made just now was read for this request, although the memory holds it by now.
        head = count if text is not None and memory.head_is_new else 0
        memory.head_is_new = False
        completion.usage = Usage(prompt=reading.total, read=reading.read + head, completion=0)
        if text is not None:
            self._instruct(memory, text, held)
        session.ingest_messages([message for turn in reading.new for message in turn.messages()])
        sampling = replace(completion.sampling, max_new_tokens=min(completion.sampling.max_new_tokens, room))
        session.clear_stats()
        pieces = session.generate(conversation.question, stream=True, **asdict(sampling))
        return cast("Generator[str, None, None]", pieces)

    @staticmethod
    def _instruct(memory: OpenMemory, text: str, held: Document | None) -> None:
        """Keep the instructions at full detail, and no others; read them first if they are new."""
        session = memory.session
        document = held or session.ingest_messages([{"role": "system", "content": text}])[0]
        span = (document.start, document.stop)
        for other in memory.history.systems.values():
            pinned = (other.start, other.stop)
            if pinned != span and pinned in session.focus.pins:
                session.unpin(pinned)
        if document.start > 0 and span not in session.focus.pins:  # the head stays without a pin
            session.pin(span)

    @staticmethod
    def _finish(memory: OpenMemory, completion: Completion, stream: Generator[str, None, None]) -> None:
        """Make the turn durable, however it ended."""
        stream.close()
        turns = memory.session.stats().turns
        if not turns:  # the question has not been read
            raise _closing()
        reason = turns[-1].finish_reason
        completion.finish_reason = "length" if reason == "cut" else reason
        completion.usage = completion.usage.model_copy(update={"completion": turns[-1].new_tokens})


def _closing() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=NO_RETRY)
