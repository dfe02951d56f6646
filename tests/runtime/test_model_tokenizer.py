"""Text to tokens and back: SmolLM2's byte-level BPE, inert control tokens, streaming."""

import time

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from mc_runtime.errors import InputError
from mc_runtime.model import Tokenizer, resolve_model

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"], include_characters="\n\t\r"), max_size=60)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<jupyter_code>"]


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return Tokenizer.from_directory(resolve_model(), eos_ids=(2,))


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """A vocabulary with "▁" for spaces and <0x..> for bytes, as Llama 2 and Mistral have."""
    pieces = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdehlo", "▁h"]
    model = tokenizers.models.BPE(
        {p: i for i, p in enumerate(pieces)}, [("▁", "h")], unk_token="<unk>", byte_fallback=True
    )
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    parts = tokenizers.decoders
    inner.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>"])
    return Tokenizer(inner)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_known_tokens(smollm: Tokenizer) -> None:
    assert smollm.vocab_size == 49152
    assert smollm.eos_ids == (2, 0)
    assert smollm.prefix_ids == ()
    assert smollm.special_ids["<|im_start|>"] == 1
    assert smollm.encode("Hello world") == [19556, 905]
    assert pieces(smollm, "in 1984,") == ["in", " ", "1", "9", "8", "4", ","], "digits one by one"
    assert pieces(smollm, "a ½ b") == ["a", " ", "½", " b"], "any numeral is cut off, its space too"
    assert smollm.encode(" world") != smollm.encode("world"), "no space is added in front"
    assert smollm.encode("") == []


@given(TEXT)
def test_round_trip(smollm: Tokenizer, text: str) -> None:
    assert smollm.decode(smollm.encode(text)) == text


def test_what_the_vocabulary_cannot_spell_is_dropped(smollm: Tokenizer) -> None:
    assert smollm.encode("\x16") == []
    assert smollm.encode("a\x04b") == [*smollm.encode("a"), *smollm.encode("b")]


@given(st.lists(st.sampled_from([*CONTROL, "a", " ", "\n", "<|", "|>", "7"]), max_size=8).map("".join))
def test_control_tokens_in_plain_text_are_inert(smollm: Tokenizer, text: str) -> None:
    ids = smollm.encode(text)
    assert not set(ids) & set(smollm.special_ids.values())
    assert smollm.decode(ids) == text


def test_control_tokens_where_asked_for(smollm: Tokenizer) -> None:
    ids = smollm.encode("<|im_start|>user\nhi<|im_end|>\n", special=True)
    assert ids[0] == 1
    assert ids.count(2) == 1
    assert smollm.decode(ids) == "user\nhi\n"
    assert smollm.decode(ids, special=True) == "<|im_start|>user\nhi<|im_end|>\n"
    assert smollm.split_special("a<|im_end|>") == ["a", "<|im_end|>", ""]


@given(st.lists(st.integers(0, 49151), max_size=30))
def test_streaming_equals_decoding(smollm: Tokenizer, ids: list[int]) -> None:
    for special in (False, True):
        stream = smollm.stream_decoder(special=special)
        assert "".join([*map(stream.push, ids), stream.flush()]) == smollm.decode(ids, special=special)


def test_streaming_holds_back_half_characters(smollm: Tokenizer) -> None:
    stream = smollm.stream_decoder()
    out = [stream.push(i) for i in smollm.encode("né 日本 🙂🏽!")]
    assert "".join(out) == "né 日本 🙂🏽!"
    assert "" in out, "some character took more than one token"
    assert not any("\ufffd" in piece for piece in out)
    broken = smollm.stream_decoder()
    assert broken.push(smollm.encode("🙂")[0]) == ""
    assert broken.flush() == "\ufffd"
    assert broken.flush() == ""


@given(st.text(st.sampled_from("ab hello é日🙂"), max_size=20))
@example("é日🙂🙂🙂é")  # a run of byte tokens longer than the decoder looks back
def test_streaming_other_decoders(sentencepiece_like: Tokenizer, text: str) -> None:
    ids = sentencepiece_like.encode(text)
    stream = sentencepiece_like.stream_decoder()
    assert "".join([*map(stream.push, ids), stream.flush()]) == sentencepiece_like.decode(ids) == text


def test_tokens_beyond_the_vocabulary_say_nothing(smollm: Tokenizer) -> None:
    stream = smollm.stream_decoder()
    assert stream.push(60_000) == stream.push(49_152) == stream.flush() == ""
    assert smollm.decode([60_000]) == ""


def test_long_text_is_linear_and_equal(smollm: Tokenizer) -> None:
    line = "The quick brown fox, aged 12, jumps over\n  the lazy dog's back. "
    text = line * (1_000_000 // len(line))
    start = time.perf_counter()
    ids = smollm.encode(text)
    assert time.perf_counter() - start < 15
    once = smollm.encode(line + line)
    assert ids[: len(once) - 8] == once[:-8]
    assert smollm.decode(ids) == text


@pytest.mark.parametrize("length", [1, 20_000])
def test_broken_text_is_refused(smollm: Tokenizer, length: int) -> None:
    with pytest.raises(InputError, match="lone surrogates"):
        smollm.encode("\ud800" * length)
    with pytest.raises(InputError, match="expected a str"):
        smollm.encode(b"bytes" * length)  # type: ignore[arg-type]


def test_fingerprint(smollm: Tokenizer, sentencepiece_like: Tokenizer) -> None:
    again = Tokenizer.from_directory(resolve_model())
    assert again.fingerprint == smollm.fingerprint
    assert len(smollm.fingerprint) == 16
    assert sentencepiece_like.fingerprint != smollm.fingerprint
    again._inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    recut = Tokenizer(again._inner)
    assert recut.fingerprint != smollm.fingerprint, "the same vocabulary, cut otherwise"
