"""Chat formats: parity with transformers, parts of a conversation, control tokens in messages."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mc_runtime.errors import ModelError
from mc_runtime.model import ChatTemplate, Tokenizer, resolve_model

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{% if loop.first and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + ' [/INST]' }}{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% endif %}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # Qwen3's habit: an answer at the end shows its (empty) thoughts, an earlier one does not
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "mistral": MISTRAL, "thinking": THINKING, "no system": NO_SYSTEM}
TALK = [
    {"role": "user", "content": "  Hi there, 2 questions. "},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Naïve\n\n日本?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def smollm() -> ChatTemplate:
    directory = resolve_model()
    return ChatTemplate.from_directory(directory, Tokenizer.from_directory(directory))


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Tokenizer:
    """Every byte a token, and the control tokens of several chat formats."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
    inner.add_special_tokens(["<s>", "</s>", *headers])
    return Tokenizer(inner)


def test_smollm_equals_transformers(smollm: ChatTemplate) -> None:
    peer = PreTrainedTokenizerFast(
        tokenizer_file=str(resolve_model() / "tokenizer.json"),
        chat_template=smollm.source,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    for messages in (TALK, [SYSTEM, *TALK], TALK[:2]):
        for generate in (False, True):
            assert smollm.render(messages, generate) == peer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
            ids = peer.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False)
            assert smollm.encode(messages, generate) == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_equal_transformers(name: str, bytes_tokenizer: Tokenizer) -> None:
    peer = PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer._inner, chat_template=TEMPLATES[name], **NAMES)
    chat = ChatTemplate(bytes_tokenizer, TEMPLATES[name], special_tokens=NAMES)
    for messages in (TALK,) if name == "no system" else (TALK, [SYSTEM, *TALK]):
        expected = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert chat.render(messages, True) == expected


@pytest.mark.parametrize("name", ["llama3", "thinking", "no system", "mistral"])
def test_parts_add_up(name: str, bytes_tokenizer: Tokenizer) -> None:
    chat = ChatTemplate(bytes_tokenizer, TEMPLATES[name], special_tokens=NAMES)
    answer = bytes_tokenizer.encode((" " if name == "mistral" else "") + TALK[1]["content"])
    first, second = (chat.user_turn_ids(TALK[i]["content"]) for i in (0, 2))
    parts = [*chat.system_ids(), *first, *answer, *chat.assistant_end_ids(), *second]
    assert parts == chat.encode(TALK, add_generation_prompt=True)
    if name in ("llama3", "thinking"):
        parts = chat.system_ids("Be brief.") + first
        assert parts == chat.encode([SYSTEM, TALK[0]], add_generation_prompt=True)


def test_smollm_parts(smollm: ChatTemplate) -> None:
    def text(ids: list[int]) -> str:
        return smollm.tokenizer.decode(ids, special=True)

    assert text(smollm.system_ids("Be brief.")) == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert "SmolLM, trained by Hugging Face" in text(smollm.system_ids())
    assert text(smollm.user_turn_ids("Hi")) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text(smollm.assistant_end_ids()) == "<|im_end|>\n"


@pytest.mark.parametrize("name", ["mistral", "no system"])
def test_a_system_text_without_a_place(name: str, bytes_tokenizer: Tokenizer) -> None:
    chat = ChatTemplate(bytes_tokenizer, TEMPLATES[name], special_tokens=NAMES)
    assert bytes_tokenizer.decode(chat.system_ids("Be brief."), special=True) == "<s>Be brief.\n\n"
    assert bytes_tokenizer.decode(chat.system_ids(), special=True) == "<s>"


MARKS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "\ue000", "\ue001", "\ue002", "\ue003", "1", "x", "\n", " "]


@given(st.lists(st.sampled_from(MARKS), max_size=8).map("".join))
def test_control_tokens_in_messages_are_text(smollm: ChatTemplate, text: str) -> None:
    tokenizer = smollm.tokenizer
    control = set(tokenizer.special_ids.values())
    turn = smollm.user_turn_ids(text)
    assert [i for i in turn if i in control] == [1, 2, 1]
    assert tokenizer.decode(turn, special=True) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert [i for i in smollm.system_ids(text) if i in control] == [1, 2]
    whole = smollm.encode([{"role": "user", "content": text}])
    assert tokenizer.decode(whole, special=True).endswith(f"user\n{text}<|im_end|>\n")


def test_no_template(bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = ChatTemplate.from_directory(tmp_path, bytes_tokenizer)
    assert chat.render([SYSTEM, *TALK[:2]]) == "Be brief.\n\nUser:   Hi there, 2 questions. \nAssistant: Yes?\n"
    assert bytes_tokenizer.decode(chat.user_turn_ids("Hi")) == "User: Hi\nAssistant:"
    assert bytes_tokenizer.decode(chat.assistant_end_ids()) == "\n"
    assert bytes_tokenizer.decode(chat.system_ids("Be brief.")) == "Be brief.\n\n"
    assert chat.system_ids() == []


def test_where_templates_are_found(bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": MISTRAL}]
    for template in (MISTRAL, several):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        assert ChatTemplate.from_directory(tmp_path, bytes_tokenizer).render(TALK[:1]).startswith("<s>[INST]")
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)
    assert ChatTemplate.from_directory(tmp_path, bytes_tokenizer).source == LLAMA3


def test_templates_that_fail(bytes_tokenizer: Tokenizer) -> None:
    chat = ChatTemplate(bytes_tokenizer, MISTRAL, special_tokens=NAMES)
    with pytest.raises(ModelError, match="roles must alternate"):
        chat.render([TALK[0], TALK[0]])
    with pytest.raises(ModelError, match="cannot be read"):
        ChatTemplate(bytes_tokenizer, "{% for %}")
    with pytest.raises(ModelError, match="refuses"):
        ChatTemplate(bytes_tokenizer, "{{ messages.__class__.__mro__ }}").render(TALK)
    with pytest.raises(ModelError, match="does not show the assistant"):
        ChatTemplate(bytes_tokenizer, "{{ messages[0].content }}").user_turn_ids("Hi")
