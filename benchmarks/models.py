"""The model that is measured: random weights in the shape of SmolLM2-135M, with a tokenizer of its own.

Speed does not depend on what weights hold, and nothing has to be downloaded. The tokenizer is byte-level BPE
as large as the model's vocabulary, trained on made-up words.

    python -m benchmarks.models
"""

import os
import random
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

VOCAB, POSITIONS = 49_152, 8_192
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS, PAD = 2, 0
"""Places in `SPECIAL`."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SYLLABLES = [first + second for first in "bcdfghjklmnprstvwz" for second in "aeiou"]


def smollm2() -> Path:
    """The folder of the model, made when there is none. Its weights are float32: servers convert them."""
    folder = _cache() / "smollm2-135m-random"
    if not (folder / "tokenizer.json").exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        _make_model(unfinished)
        _make_tokenizer(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return folder


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LLMBOOST_BENCHMARK_MODELS") or f"{home}/llmboost/benchmarks").expanduser()


def _make_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Their logits are 0, far below the best of 49,152: no answer ends early, with whatever server.
        model.model.embed_tokens.weight[: len(SPECIAL)] = 0
    model.save_pretrained(folder)


def _make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    if tokenizer.get_vocab_size() != VOCAB:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens and not {VOCAB}")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)


def _texts() -> Iterator[str]:
    """Words of two to four syllables, often enough for each to become a token."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices(_SYLLABLES, k=draw.randint(2, 4))) for _ in range(60_000)]
    for _ in range(8):
        draw.shuffle(vocabulary)
        yield " " + " ".join(vocabulary)


@lru_cache
def tokenizer(folder: Path) -> Any:
    """Of the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def text_of(folder: Path, tokens: int, seed: int) -> str:
    """A text that is so many tokens long: for servers that take no token ids."""
    encode = tokenizer(folder)
    draw = random.Random(seed)
    ids = [draw.randint(1000, VOCAB - 1) for _ in range(2 * tokens)]
    text = encode.decode(encode(encode.decode(ids)).input_ids[:tokens])
    # Where it was cut, its last word may come apart in another way.
    while len(found := encode(text).input_ids) != tokens:
        text = encode.decode(found[:tokens]) if len(found) > tokens else text + " ba"
    return text


if __name__ == "__main__":
    print(smollm2())
