"""Which tokens of an example are targets.

A tokenizer tells where in the text each token came from; a token is a target if any of it lies in what is to be
learnt. The text is tokenized as a whole, as the model will see it: tokens do not end where turns do.
"""

import re
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from cola_server.jobs.jsonl import Message

Span = tuple[int, int]
"""From the first character on, to before the last."""

GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")


class UnmaskableError(Exception):
    """The tokenizer or its chat template cannot tell what is to be learnt; says why."""


def completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, max_length: int
) -> tuple[list[int], list[bool]]:
    """Tokens of prompt and completion, at most `max_length`, and whether each is a target: the completion's are, and
    the end-of-text token that follows it, where the tokenizer has one.

    Raises: `UnmaskableError`.
    """
    ids, mask = _tokenized(tokenizer, prompt + text, [(len(prompt), len(prompt) + len(text))], special=True)
    end = tokenizer.eos_token_id
    if end is not None:
        if ids[-1:] != [end]:
            ids, mask = [*ids, end], [*mask, False]
        mask[-1] = True
    return ids[:max_length], mask[:max_length]


def conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int
) -> tuple[list[int], list[bool]]:
    """Tokens of the chat template's rendering, at most `max_length`, and whether each is a target: the assistant's
    turns are, from what follows the template's invitation to speak to the mark that ends the turn. Where the template
    marks them itself (`{% generation %}`), it is taken at its word.

    Raises: `UnmaskableError`.
    """
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        problem = "this model has no chat template; send lines of prompt and completion, or of text"
        raise UnmaskableError(problem) from None
    try:
        if GENERATION_TAG.search(template):
            marked = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
            assert isinstance(marked, BatchEncoding)
            ids, mask = list(marked["input_ids"]), [bool(each) for each in marked["assistant_masks"]]
        else:
            whole, spans = _turns(tokenizer, chat)
            ids, mask = _tokenized(tokenizer, whole, spans, special=False)
    except TemplateError as error:
        raise UnmaskableError(f"the model's chat template refuses it: {error}") from None
    return ids[:max_length], mask[:max_length]


def _turns(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> tuple[str, list[Span]]:
    """The rendered chat, and where the assistant speaks in it.

    A turn is what the rendering gains by it over the invitation to speak that precedes it. White space after the
    mark that ends a turn belongs to the template: the model never has to write it.
    """
    whole = _render(tokenizer, chat)
    spans = []
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, chat[:number], add_generation_prompt=True)
        after = _render(tokenizer, chat[: number + 1])
        if not (after.startswith(before) and whole.startswith(after)):
            problem = (
                "the model's chat template changes earlier turns when later ones follow; send prompt and completion"
            )
            raise UnmaskableError(problem)
        spans.append((len(before), len(after.rstrip())))
    return whole, spans


def _render(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], *, special: bool
) -> tuple[list[int], list[bool]]:
    if not tokenizer.is_fast:
        raise UnmaskableError("this model's tokenizer does not tell where tokens come from; send lines of text")
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    mask = [
        any(begin < end and begin < stop and end > start for start, stop in spans)
        for begin, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), mask
