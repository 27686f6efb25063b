"""Loss masks: what is learnt is the assistant's turns or the completion, nothing before and nothing between."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_server.jobs.jsonl import Message
from cola_server.training import masks
from tests.support.tokenizers import (
    FORGETFUL_TEMPLATE,
    LLAMA2_TEMPLATE,
    SMOLLM2_TEMPLATE,
    TAGGED_TEMPLATE,
    UNTAGGED_TEMPLATE,
    bytes_tokenizer,
)

LONG = 10**6
TOKENIZER = bytes_tokenizer()
TAGGED = bytes_tokenizer(TAGGED_TEMPLATE)
UNTAGGED = bytes_tokenizer(UNTAGGED_TEMPLATE)

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
spoken = text.filter(str.strip)
chats = st.lists(
    st.one_of(
        st.builds(Message, st.sampled_from(["system", "user"]), text),
        st.builds(Message, st.just("assistant"), spoken),
    ),
    min_size=1,
    max_size=6,
).map(lambda messages: [Message("user", "hello"), *messages])


def learnt(tokenizer, ids, mask):
    return tokenizer.decode([id for id, target in zip(ids, mask, strict=True) if target])


def chat(*contents):
    return [
        Message(role, content) for role, content in zip(["user", "assistant"] * len(contents), contents, strict=False)
    ]


# --- conversations --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(chats)
def test_the_assistants_turns_and_their_ends_are_learnt_and_nothing_else(messages):
    ids, mask = masks.conversation(TOKENIZER, messages, LONG)
    turns = [message.content for message in messages if message.role == "assistant"]
    assert learnt(TOKENIZER, ids, mask) == "".join(turn + "<|im_end|>" for turn in turns)
    rendered = [{"role": message.role, "content": message.content} for message in messages]
    assert ids == TOKENIZER.apply_chat_template(rendered, return_dict=True)["input_ids"]


@settings(deadline=None, max_examples=100)
@given(chats)
def test_a_templates_own_marks_and_rendering_turn_by_turn_agree(messages):
    assert masks.conversation(TAGGED, messages, LONG) == masks.conversation(UNTAGGED, messages, LONG)


def test_a_template_without_an_invitation_to_speak():
    tokenizer = bytes_tokenizer(LLAMA2_TEMPLATE)
    ids, mask = masks.conversation(tokenizer, chat("a", "one", "b", "two"), LONG)
    assert learnt(tokenizer, ids, mask) == " one <|im_end|> two <|im_end|>"


@pytest.mark.parametrize("template", [SMOLLM2_TEMPLATE, TAGGED_TEMPLATE])
@pytest.mark.parametrize("length", [1, 2, 40, 200])
def test_a_conversation_is_cut_at_its_end(template, length):
    tokenizer = bytes_tokenizer(template)
    messages = chat("hello " * 10, "there " * 10, "hello", "again")
    ids, mask = masks.conversation(tokenizer, messages, LONG)
    assert masks.conversation(tokenizer, messages, length) == (ids[:length], mask[:length])


def test_what_a_template_refuses_is_told():
    tokenizer = bytes_tokenizer(LLAMA2_TEMPLATE)
    with pytest.raises(masks.UnmaskableError, match="must alternate"):
        masks.conversation(tokenizer, [Message("user", "a"), Message("user", "b")], LONG)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = bytes_tokenizer(FORGETFUL_TEMPLATE)
    with pytest.raises(masks.UnmaskableError, match="changes earlier turns"):
        masks.conversation(tokenizer, chat("a", "b", "c", "d"), LONG)


def test_a_model_without_a_template_is_told():
    with pytest.raises(masks.UnmaskableError, match="no chat template"):
        masks.conversation(bytes_tokenizer(None), chat("a", "b"), LONG)


# --- completions ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(text, spoken)
def test_the_completion_and_the_texts_end_are_learnt(prompt, completion):
    ids, mask = masks.completion(TOKENIZER, prompt, completion, LONG)
    assert ids == [*TOKENIZER(prompt + completion)["input_ids"], TOKENIZER.eos_token_id]
    assert mask == sorted(mask)  # targets are the sequence's end
    if (prompt[-1:], completion[0]) not in ((":", "Z"), ("a", "b"), ("h", "e"), ("e", "l"), ("l", "l")):
        assert learnt(TOKENIZER, ids, mask) == completion + "<|im_end|>"


def test_a_token_of_prompt_and_completion_is_learnt():
    ids, mask = masks.completion(TOKENIZER, "x:", "Zy", LONG)
    assert [TOKENIZER.decode(id) for id in ids] == ["x", ":Z", "y", "<|im_end|>"]
    assert mask == [False, True, True, True]


def test_one_character_of_many_tokens_is_learnt_whole():
    _, mask = masks.completion(TOKENIZER, "é", "𝄞", LONG)
    assert mask == [False] * 2 + [True] * 4 + [True]


def test_marks_around_a_text_are_kept_once():
    begin, end = bytes_tokenizer(begin=True), bytes_tokenizer(end=True)
    ids, mask = masks.completion(begin, "a", "c", LONG)
    assert ids == [*begin("ac")["input_ids"], begin.eos_token_id]
    assert mask == [False, False, True, True]
    ids, mask = masks.completion(end, "a", "c", LONG)
    assert ids == end("ac")["input_ids"]
    assert mask == [False, True, True]


def test_without_an_end_of_text_token_none_is_added():
    tokenizer = bytes_tokenizer(eos=False)
    assert masks.completion(tokenizer, "a", "c", LONG) == (tokenizer("ac")["input_ids"], [False, True])


@pytest.mark.parametrize("length", range(1, 9))
def test_a_completion_is_cut_at_its_end_even_if_no_target_stays(length):
    ids, mask = masks.completion(TOKENIZER, "12345", "67", LONG)
    assert masks.completion(TOKENIZER, "12345", "67", length) == (ids[:length], mask[:length])
    assert any(mask[:length]) == (length > 5)


def test_a_tokenizer_that_tells_no_offsets_is_refused(monkeypatch):
    tokenizer = bytes_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    for call in (
        lambda: masks.completion(tokenizer, "a", "b", LONG),
        lambda: masks.conversation(tokenizer, chat("a", "b"), LONG),
    ):
        with pytest.raises(masks.UnmaskableError, match="does not tell where"):
            call()
