"""Text to token ids and back, over a model's `tokenizer.json`.

Plain text never yields control tokens: what a user types as "<|im_start|>" is encoded letter by letter. Control
tokens are those that the tokenizer declares special.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import tokenizers

from mc_runtime.errors import InputError, ModelError

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "</s>")
"""Names by which models call an end of turn or of text; those that a vocabulary holds as control tokens stop decoding
even where its config names only one of them."""
PROBE = "Hello  world\n\n  1234567 naïve café 日本語 don't I'LL a\tb\r\n x=y+42; def f(): #✓ 🙂"
"""Text whose tokens tell apart tokenizers that share a vocabulary but cut text differently."""

LONG_TEXT = 10_000


class StreamDecoder(Protocol):
    """Text of a token stream as it becomes certain: no character is given out in halves."""

    def push(self, token: int) -> str:
        """The text that has become complete with this token, often empty inside a multi-byte character."""
        ...

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got complete."""
        ...


class Tokenizer:
    """See the module. Stateless apart from caches: one instance serves many threads."""

    def __init__(self, inner: tokenizers.Tokenizer, *, eos_ids: Iterable[int] = ()) -> None:
        inner.encode_special_tokens = True  # "treat special tokens in text as text"
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        named = (self.special_ids[name] for name in END_TOKENS if name in self.special_ids)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*eos_ids, *named)))
        self.prefix_ids: tuple[int, ...] = tuple(inner.encode("", add_special_tokens=True).ids)

    @classmethod
    def from_directory(cls, directory: Path, *, eos_ids: Iterable[int] = ()) -> Tokenizer:
        """Read `tokenizer.json`. Raises `ModelError` when it is missing or not understood."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{directory} has no tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), eos_ids=eos_ids)
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{path} cannot be read: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, control tokens included (a model may have more rows than that)."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the vocabulary, the control tokens and the tokens of a probe text."""
        vocab = sorted((i, token) for token, i in self._inner.get_vocab(with_added_tokens=True).items())
        described = repr((vocab, sorted(self.special_ids.items()), self.encode(PROBE), self.prefix_ids))
        return hashlib.sha256(described.encode("utf-8")).hexdigest()[:16]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, nothing prepended (see `prefix_ids` for what the model expects at the very start).

        special: read control tokens written in the text as such; only for text that does not come from a user.
        What the vocabulary cannot spell is dropped, as other runtimes do (in SmolLM2 six control characters, such as
        U+0016, and unassigned planes); every other text comes back from `decode` as it was.
        Raises `InputError` for text that is not valid Unicode.
        """
        if not special or self._special is None:
            return self._encode_plain(text)
        ids: list[int] = []
        for piece in self._special.split(text):
            if piece in self.special_ids:
                ids.append(self.special_ids[piece])
            elif piece:
                ids += self._encode_plain(piece)
        return ids

    def split_special(self, text: str) -> list[str]:
        """`text` cut before and after each control token; control tokens at the odd indices."""
        return self._special.split(text) if self._special else [text]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; control tokens are left out unless `special`. Broken UTF-8 becomes U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=not special))

    def stream_decoder(self, *, special: bool = False) -> StreamDecoder:
        """A decoder for tokens that come one at a time; its pieces add up to `decode` of them all."""
        skipped = frozenset() if special else frozenset(self.special_ids.values())
        if self._is_byte_level:
            return _ByteStream(self._inner, skipped)
        return _WindowStream(self, skipped)

    def _encode_plain(self, text: str) -> list[int]:
        try:
            if len(text) > LONG_TEXT:  # the batch call leaves out offsets, which take a third of the time
                return list(self._inner.encode_batch_fast([text], add_special_tokens=False)[0].ids)
            return list(self._inner.encode(text, add_special_tokens=False).ids)
        except (UnicodeError, TypeError) as error:
            kind = "a str" if not isinstance(text, str) else "valid Unicode (no lone surrogates)"
            raise InputError(f"text: expected {kind}, got {type(text).__name__}") from error

    @cached_property
    def _is_byte_level(self) -> bool:
        return isinstance(self._inner.decoder, tokenizers.decoders.ByteLevel)


class _ByteStream:
    """Byte-level BPE: a token is a string of bytes, written in GPT-2's printable alphabet."""

    def __init__(self, inner: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        self._inner = inner
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        text = None if token in self._skipped else self._inner.id_to_token(token)
        return "" if text is None else self._utf8.decode(_token_bytes(text))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream:
    """Any other decoder: decode a short window twice, without and with the new token, and give out the difference."""

    LONGEST = 16

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        # Tokens whose text was given out, release by release: where one ends no character is cut. Byte tokens decode to
        # nothing but U+FFFD once the first of a run is missing.
        self._given: list[list[int]] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        self._held.append(token)
        return self._release(force=len(self._held) >= self.LONGEST)

    def flush(self) -> str:
        return self._release(force=True)

    def _release(self, *, force: bool) -> str:
        given = [token for release in self._given for token in release]
        before = self._tokenizer.decode(given, special=True)
        text = self._tokenizer.decode(given + self._held, special=True)
        if (len(text) <= len(before) or text.endswith("\ufffd")) and not force:
            return ""
        self._given.append(self._held)
        self._held = []
        while len(self._given) > 1 and sum(map(len, self._given)) > self.LONGEST:
            del self._given[0]
        return text[len(before) :]


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the rest for code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


_ALPHABET = _gpt2_alphabet()


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[char] for char in token)
    except KeyError:  # an added token, written as it is
        return token.encode("utf-8")
