"""A model whose greedy output is known by heart, in a folder that a worker can serve.

Its tokens are pieces of the texts below, cut without regard to characters, each piece once. Embeddings are
one-hot, attention and feed-forward add nothing, and the output layer sends each token to the next of its
text. So the text that comes out must be the text that was put in, and most tokens are parts of characters.
It refuses to chat: its template raises.
"""

import json
from itertools import cycle
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

TEXTS = (
    "Emoji: 😀🎉🚀 and joined ones 👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈 and flags 🇯🇵🇧🇷 end.",
    "日本語のテキストと、中文的句子，그리고 한국어 문장입니다。𠮷野家で𝔘𝔫𝔦𝔠𝔬𝔡𝔢を読む。",
    "Ünïcödé naïve façade; шифр мира; שלום עולם; مرحبا بالعالم; हिन्दी में नमस्ते; z̷̢a̶l̸g̵o̷ ✂️ ½ ‰ €.",
)
TEMPLATE_ERROR = "This model knows three texts by heart and does not chat"
SIZE = 512
"""Of the vocabulary and of the hidden state."""
END = 0


def prompt_for(number: int) -> list[int]:
    """The prompt that makes the model say `TEXTS[number]`."""
    return [1 + number]


def pieces() -> list[list[bytes]]:
    """Every text in pieces of 1 to 5 bytes, no piece twice, none longer than it need be."""
    used: set[bytes] = set()
    found = []
    for text in TEXTS:
        data, start, cut = text.encode(), 0, []
        widths = cycle((1, 2, 1, 3))
        while start < len(data):
            width = next(widths)
            while data[start : start + width] in used and start + width < len(data):
                width += 1
            piece = data[start : start + width]
            assert piece not in used, "two texts end alike: cut them otherwise"
            used.add(piece)
            cut.append(piece)
            start += width
        found.append(cut)
    return found


def save_script_model(folder: Path) -> Path:
    """Writes the model."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<|end|>": END, **{f"<|text{n}|>": id_ for n in range(len(TEXTS)) for id_ in prompt_for(n)}}
    after: dict[int, int] = {}
    for number, cut in enumerate(pieces()):
        (last,) = prompt_for(number)
        for piece in cut:
            token = len(vocabulary)
            vocabulary["".join(BYTES[byte] for byte in piece)] = token
            after[last] = last = token
        after[last] = END
    assert len(vocabulary) < SIZE
    _save_weights(folder, after)
    _save_tokenizer(folder, vocabulary)
    return folder


def _bytes_as_characters() -> dict[int, str]:
    """GPT-2's: printable bytes stand for themselves, the others for characters from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


BYTES = _bytes_as_characters()


def _save_weights(folder: Path, after: dict[int, int]) -> None:
    one_hot = np.eye(SIZE, dtype=np.float32)
    nothing = np.zeros((SIZE, SIZE), dtype=np.float32)
    anything = np.random.default_rng(0).normal(0, 0.05, (SIZE, SIZE)).astype(np.float32)
    output = nothing.copy()
    for token in range(SIZE):
        output[after.get(token, END), token] = 3.0  # times the norm's sqrt(SIZE): far above any rival
    layer = "model.layers.0"
    save_file(
        {
            "model.embed_tokens.weight": one_hot,
            "model.norm.weight": np.ones(SIZE, dtype=np.float32),
            "lm_head.weight": output,
            f"{layer}.input_layernorm.weight": np.ones(SIZE, dtype=np.float32),
            f"{layer}.post_attention_layernorm.weight": np.ones(SIZE, dtype=np.float32),
            f"{layer}.self_attn.q_proj.weight": anything,
            f"{layer}.self_attn.k_proj.weight": anything.T.copy(),
            f"{layer}.self_attn.v_proj.weight": anything,
            f"{layer}.self_attn.o_proj.weight": nothing,
            f"{layer}.mlp.gate_proj.weight": anything,
            f"{layer}.mlp.up_proj.weight": anything,
            f"{layer}.mlp.down_proj.weight": nothing,
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": SIZE,
        "intermediate_size": SIZE,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": SIZE,
        "vocab_size": SIZE,
        "eos_token_id": END,
        "bos_token_id": None,
        "pad_token_id": END,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _save_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in vocabulary if name.startswith("<|")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ raise_exception('" + TEMPLATE_ERROR + "') }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


assert set(BYTES.values()) == set(ByteLevel.alphabet())
