"""The engine's greedy output against transformers' own `generate`."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from tests.unit.engine_configs import CONFIGS, EOS, FAMILIES, PAD
from tests.unit.engine_models import driving, prompt, request, save_model

PROMPTS = [
    prompt(length)
    for length in [
        *(
            1,
            2,
            3,
            5,
            7,
            8,
            9,
            12,
            15,
            16,
            17,
            20,
            23,
            29,
            31,
            33,
            40,
            47,
            50,
            55,
            60,
            64,
            65,
            70,
            77,
            90,
            100,
        ),
        *(120, 127, 130, 150, 200),
    ]
]
FEW = [prompt(length) for length in (1, 7, 16, 30, 65, 130)]


def generate(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """By transformers, as one left-padded batch."""
    text = type(AutoConfig.from_pretrained(folder)) in AutoModelForCausalLM._model_mapping
    model = (AutoModelForCausalLM if text else AutoModelForMultimodalLM).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    width = max(len(ids) for ids in prompts)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([[PAD] * (width - len(ids)) + ids for ids in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    rows = out[:, width:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixed_batch_gets_token_for_token_what_generate_gives(name: str, tmp_path: Path) -> None:
    """32 prompts at once, some longer than a step's tokens, some outgrowing their blocks."""
    folder = save_model(CONFIGS[name], tmp_path)
    with driving(folder, max_num_batched_tokens=48, max_num_seqs=20) as driver:
        results = driver.run(*(request(str(i), ids, max_tokens=12) for i, ids in enumerate(PROMPTS)))
    assert [result.token_ids for result in results] == generate(folder, PROMPTS, 12)
    assert all(result.finish_reason in ("length", "stop") for result in results)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_what_generate_gives(name: str, tmp_path: Path) -> None:
    """Prompts in chunks of a few tokens, past every window."""
    folder = save_model(FAMILIES[name], tmp_path, spread=0.1)
    with driving(folder, max_num_batched_tokens=24, max_num_seqs=4) as driver:
        results = driver.run(*(request(str(i), ids, max_tokens=20) for i, ids in enumerate(FEW)))
    assert [result.token_ids for result in results] == generate(folder, FEW, 20)
    assert len({id for result in results for id in result.token_ids}) > 10, "says nothing in particular"
