"""A small Llama with random weights and a tokenizer of 64 words: for what does not depend on the model."""

from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.models import VOCABULARY, tokenizer


def save_llama(folder: Path, *, layers: int, hidden: int, intermediate: int, heads: int, positions: int) -> Path:
    """Writes it, fp32, as transformers reads it. Returns: `folder`."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
