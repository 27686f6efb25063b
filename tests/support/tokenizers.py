"""Tiny tokenizers for tests of data: every byte is a token, and a few pairs are merged."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As SmolLM2-135M-Instruct has it."""

TAGGED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML that marks the assistant's turns itself."""

UNTAGGED_TEMPLATE = TAGGED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")

LLAMA2_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<|im_start|>[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + '<|im_end|>' }}{% endif %}{% endfor %}"
)
"""The shape of Llama 2's: no invitation to speak, and turns must alternate."""

FORGETFUL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% if loop.last %}last {% endif %}"
    "{{ message['role'] + ':' + message['content'] }}<|im_end|>{% endfor %}"
)
"""Writes a turn otherwise once another follows, as templates do that strip earlier thoughts."""

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), (":", "Z"), ("a", "b")]


def bytes_tokenizer(
    template: str | None = SMOLLM2_TEMPLATE, *, begin: bool = False, end: bool = False, eos: bool = True
) -> PreTrainedTokenizerFast:
    """Byte-level BPE. `begin` and `end`: marks put around every text; `eos`: whether it has an end-of-text token,
    which is the padding too, as SmolLM2's is.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in ("<|im_start|>", "<|im_end|>")]
    pattern = " ".join(["<|im_start|>"] * begin + ["$A"] + ["<|im_end|>"] * end)
    tokenizer.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>" if eos else None)
    fast.pad_token = "<|im_end|>"
    fast.chat_template = template
    return fast
