# SPDX-License-Identifier: Apache-2.0
"""A random Llama of a few thousand weights with a trained tokenizer, made offline."""

from pathlib import Path

import torch

TEXT = "\n\n".join(
    f"Paragraph {i}: the column {i * 7 % 31} of matrix {chr(97 + i % 26)} stays dense, "
    f"because {i * i % 17} of its {i + 3} weights matter more than the others do."
    for i in range(400)
)


def write_text(path: Path) -> Path:
    path.write_text(TEXT, encoding="utf-8")
    return path


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


def make_model(seed: int = 0, vocabulary: int = 320):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(path: Path, seed: int = 0) -> Path:
    """Save model and tokenizer as a Hugging Face directory."""
    tokenizer = make_tokenizer()
    model = make_model(seed, len(tokenizer))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
