"""Memories of histories, kept on disk: a history is read once, whatever is asked of it later."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mc_runtime import Session
from mc_runtime.config import MemoryConfig
from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel

from .base import History, Progress
from .fill import append_copied, read_sample, unread_spans

# Changes whenever the same key would name a memory with other content.
FORMAT = 1


class MemoryStore:
    """Memories under `folder`, named by what they were made of: tokens, model, GistNet and settings of ingest."""

    def __init__(self, folder: Path, model: LoadedModel, config: MemoryConfig, gistnet: Path | None = None) -> None:
        """Raises ModelError if the weights cannot be used."""
        self.folder, self.model, self.config, self.gistnet = folder, model, config, gistnet
        net = GistNet.untrained(model.decoder, config.block_size)
        if gistnet is not None:
            net = GistNet.load(gistnet, model.decoder, config.block_size)
        self._fingerprint = net.fingerprint
        self._shared: tuple[str, Session] | None = None

    def key(self, history: History) -> str:
        """16 hexadecimal digits."""
        c = self.config
        settings = (c.block_size, c.ingest, c.ingest_chunk, c.ingest_window, c.system_prompt, self.model.decoder.dtype)
        about = (FORMAT, self.model.fingerprint, self.model.tokenizer.fingerprint, self._fingerprint, settings)
        digest = hashlib.sha256(repr((about, history.read)).encode())
        digest.update(np.ascontiguousarray(history.ids, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def prepare(self, history: History, progress: Progress | None = None) -> Path:
        """The directory of this history's memory, read now if it is not there. progress: called with tokens done."""
        target = self.folder / f"memory-{self.key(history)}"
        if target.exists():
            if progress is not None:
                progress(len(history.ids))
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{target.name}.{uuid.uuid4().hex[:8]}.part"
        try:
            with self._open(partial) as session:
                self._read(session, history, progress or (lambda _: None))
            partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def _open(self, path: Path) -> Session:
        return Session.open(path, self.model, gistnet=self.gistnet, config=self.config)

    def _read(self, session: Session, history: History, progress: Progress) -> None:
        unread = unread_spans(history)
        sample = read_sample(self._open, history) if unread else None
        pieces = [*((span, True) for span in history.read or ((0, len(history.ids)),)), *((s, False) for s in unread)]
        for (start, stop), is_read in sorted(pieces):
            if is_read:

                def inside(done: int, at: int = start) -> None:
                    progress(at + done)

                session.ingest(history.ids[start:stop], progress=inside)
            else:
                assert sample is not None
                append_copied(session, history.ids[start:stop], sample)
            progress(stop)

    def shared(self, history: History, progress: Progress | None = None) -> Session:
        """A session over the history that several readers may use, on branches only; it stays open until another is
        asked for."""
        key = self.key(history)
        if self._shared is None or self._shared[0] != key:
            self.close()
            self._shared = (key, self._open(self.prepare(history, progress)))
        return self._shared[1]

    @contextmanager
    def copy(self, history: History, progress: Progress | None = None) -> Iterator[Session]:
        """A session over a copy of the memory that may grow, and is gone afterwards."""
        source = self.prepare(history, progress)
        if self._shared is not None and self._shared[0] == self.key(history):
            self.close()  # a copy of files that are being written to may be torn
        with TemporaryDirectory(dir=self.folder) as scratch:
            path = Path(scratch) / "memory"
            shutil.copytree(source, path)
            with self._open(path) as session:
                yield session

    def close(self) -> None:
        if self._shared is not None:
            session, self._shared = self._shared[1], None
            session.close()
