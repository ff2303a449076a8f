"""Small tokenizers of the kinds that language models have, made here: no network, no files."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from llmboost_worker.text import Tokenizer

CORPUS = [
    "Hello, world! The quick brown fox jumps over the lazy dog.",
    "The capital of France is Paris. How are you today? I'm fine, thanks.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "你好，世界。今天天气很好。日本語のテキスト。",
    "Größe, café, naïve, Ελλάδα, привет мир",
    "👩‍👩‍👧 👍🏽 🇫🇷 😀😀",
] * 3

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: every token is bytes."""
    return Tokenizer(byte_level_of_transformers())


def byte_level_of_transformers(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
    )
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("工具 é", special=False)])
    return wrap(backend, bos_token="<|begin|>", eos_token="<|end|>", chat_template=chat_template)


@cache
def byte_fallback(strip: bool = True) -> Tokenizer:
    """As Llama 2 and Mistral, and without `strip` as Gemma: ▁ for a space, bytes for what has no token."""
    return Tokenizer(byte_fallback_of_transformers(strip))


def byte_fallback_of_transformers(strip: bool = True) -> Any:
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = Backend(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    latin = [text for text in CORPUS if text.isascii()]
    trainer = trainers.BpeTrainer(
        vocab_size=150, limit_alphabet=70, special_tokens=["<unk>"], show_progress=False
    )
    learned.train_from_iterator(latin, trainer)
    words = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    vocab = {token: n for n, token in enumerate(dict.fromkeys([*first, *words, "▁▁", "你", "�"]))}
    merges = [
        (left, token[len(left) :])
        for token in vocab
        for left in (token[:cut] for cut in range(1, len(token)))
        if left in vocab and token[len(left) :] in vocab and not token.startswith("<")
    ]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return wrap(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def unigram() -> Tokenizer:
    """As T5: Metaspace, no bytes, an unknown token."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(wrap(backend, eos_token="</s>", unk_token="<unk>"))


@cache
def word_piece() -> Tokenizer:
    """As BERT: ## for what goes on a word, spaces between the others."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(wrap(backend, unk_token="[UNK]"))


@cache
def slow() -> Tokenizer:
    """As ByT5: written in Python, a byte a token, invalid bytes left out."""
    from transformers import ByT5Tokenizer

    return Tokenizer(ByT5Tokenizer())


ALL = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_unstripped": lambda: byte_fallback(strip=False),
    "unigram": unigram,
    "word_piece": word_piece,
    "slow": slow,
}


def wrap(backend: Backend, **tokens: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a vocabulary entry that must exist."""
    return tokenizer.hf.get_vocab()[token]
