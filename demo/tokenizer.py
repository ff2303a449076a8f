"""The demo model's tokenizer, trained on a sample of the corpus, and its chat template."""

from __future__ import annotations

import itertools

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo.corpus import END_OF_TEXT, IM_END, IM_START, documents

VOCAB_SIZE = 2048
MAX_POSITIONS = 2048

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('Unknown role: ' ~ message['role'] ~ '. Use system, user or assistant.') -}}
{%- endif -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] is not none -%}
{%- for part in message['content'] -%}
{%- if part['type'] != 'text' -%}
{{- raise_exception('Only text content is supported, not ' ~ part['type'] ~ '.') -}}
{%- endif -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def make_tokenizer(seed: int, sample: int = 30_000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a sample of the corpus.

    Digits are split one by one, so that the model sees 17 as 1 and 7 and can learn to add. There is no
    normaliser and no clean-up, and all 256 bytes are in the vocabulary, so any text comes back exactly as
    it went in.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in (END_OF_TEXT, IM_START, IM_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        # Longer tokens would swallow whole invented names, which are to be copied piece by piece.
        max_token_length=12,
    )
    texts = (
        text
        for doc in itertools.islice(documents(seed + 1), sample)
        for _, text in doc.turns or [("", doc.text)]
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the number of a special token."""
    return int(tokenizer.backend_tokenizer.token_to_id(token))
