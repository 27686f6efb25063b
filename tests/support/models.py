"""Tiny random models, built from configs: hidden size 32, 2 layers, a vocabulary of 64 words. Nothing is downloaded."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cola_server.model import BaseModel
from cola_server.model.load import load

VOCABULARY = 64
HIDDEN = 32
POSITIONS = 64

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
"""The shape of SmolLM2's, in words."""


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
        )
    )


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(_gpt2_config())


def _gpt2_classifier() -> PreTrainedModel:
    config = _gpt2_config()
    config.pad_token_id = 0
    return GPT2ForSequenceClassification(config)


def _gpt2_config() -> GPT2Config:
    return GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=POSITIONS)


def _opt() -> PreTrainedModel:
    """Its fc1 and fc2 see flattened rows."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def _bert() -> PreTrainedModel:
    """Its pooler's dense layer and its classifier see one row an example."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            num_labels=3,
        )
    )


def _twice() -> PreTrainedModel:
    """A Llama whose two layers have one feed-forward block: its sites are called twice in a pass."""
    module = _llama()
    module.model.layers[1].mlp = module.model.layers[0].mlp
    return module


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": _bert,
    "gpt2-classifier": _gpt2_classifier,
    "twice": _twice,
}


def tiny(kind: str, *, seed: int = 0) -> PreTrainedModel:
    """A fresh random model, in eval mode, the same for the same seed.

    Weights are larger than a real model's at the start: with standard deviation 0.02 a tiny model's gradients are all
    but zero, and a test of equality would compare rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = KINDS[kind]()
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return module.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words `w0`, `w1` … by white space, with a chat template; pads with `<|pad|>`, id 0."""
    special = ["<|pad|>", "<|endoftext|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, "system", "user", "assistant"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    word_level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    word_level.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=word_level,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        unk_token="<|unk|>",
        model_max_length=POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """Writes a model with its tokenizer as a server would find it. Not for `twice`, which no config describes."""
    assert kind != "twice"
    tiny(kind, seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load_tiny(kind: str, folder: Path, *, gradient_checkpointing: bool = False, dtype: str = "fp32") -> BaseModel:
    """The saved model as the server holds it."""
    save_tiny(kind, folder)
    return load(kind, str(folder), dtype=dtype, device="cpu", gradient_checkpointing=gradient_checkpointing)


def base_of(module: PreTrainedModel, *, head_name: str | None = None) -> BaseModel:
    """A base model around a module that no folder holds."""
    module.requires_grad_(False)
    module.config.use_cache = False
    return BaseModel(
        name="tiny",
        path="",
        module=module.eval(),
        tokenizer=tokenizer(),
        task="causal-lm" if head_name is None else "sequence-classification",
        device=torch.device("cpu"),
        dtype=torch.float32,
        head_name=head_name,
        parameters=sum(p.numel() for p in module.parameters()),
        digest="0" * 32,
        gradient_checkpointing=False,
    )
