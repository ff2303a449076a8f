"""transformers' own `generate`, run once for a list of prompts in a process of its own.

`python -m tests.e2e.reference FOLDER` reads requests (JSON) on stdin and prints `Reference`s on stdout.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.commands import ROOT

NEAR_TIE = 1e-4
"""Distance of the two best logits below which float32's rounding may decide between them; it depends on the
shape of the batch."""


@dataclass
class Reference:
    """What `generate` makes of one prompt."""

    prompt_tokens: int
    token_ids: list[int]
    text: str
    """Of those tokens, special ones skipped."""
    sure: int
    """How many of the tokens come before the first near-tie."""


class Asking:
    """`generate` at work, so that a server can load meanwhile."""

    def __init__(self, folder: Path, requests: list[dict[str, Any]]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.reference", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdin
        self._process.stdin.write(json.dumps(requests))
        self._process.stdin.close()
        self._process.stdin = None

    def result(self, within: float) -> list[Reference]:
        """One per request."""
        try:
            out, err = self._process.communicate(timeout=within)
        finally:
            self._process.kill()
            self._process.wait()
        assert self._process.returncode == 0, err
        return [Reference(**reference) for reference in json.loads(out)]


def main(folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    references = []
    for request in json.load(sys.stdin):
        if "messages" in request:
            text = tokenizer.apply_chat_template(
                request["messages"], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(request["prompt"])["input_ids"]
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            max_new_tokens=request["max_tokens"],
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, len(ids) :].tolist()
        best = torch.stack(out.logits)[:, 0].topk(2, dim=-1).values
        near = (best[:, 0] - best[:, 1] < NEAR_TIE).nonzero()[:, 0].tolist()
        text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        references.append(asdict(Reference(len(ids), new, text, near[0] if near else len(new))))
    print(json.dumps(references))


if __name__ == "__main__":
    main(sys.argv[1])
