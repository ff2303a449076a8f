"""Proof that every token of an answer is the one to be drawn after those before it, up to numerical ties.

`python -m tests.faults.ties` reads answers (JSON) on stdin and prints a `Verdict` for each on stdout. One
forward of transformers' own over prompt and answer gives the scores at each position, without batch or cache.
So an answer that took another turn at a tie is held to what an unbroken run makes of that turn.
"""

import asyncio
import copy
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.commands import ROOT

NEAR = 1e-4
"""Distance of two scores below which float32's rounding may decide between them; it depends on the shape of
the batch. Scores are logits; with a temperature, what they are divided by that, as the draw has them."""


@dataclass
class Answer:
    """One choice of one request, as the stream had it."""

    body: dict[str, Any]
    choice: int
    token_ids: list[int]
    text: str
    finish_reason: str | None


@dataclass
class Verdict:
    """What a plain forward says of it."""

    wrong: str = ""
    """Empty if it is right but for ties."""
    ties: dict[int, float] = field(default_factory=dict)
    """Position of each token that a plain forward would not have drawn: how far it was from it."""


async def judge(answers: list[Answer]) -> list[Verdict]:
    """A verdict for each, from a process of its own."""
    if not answers:
        return []
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.faults.ties",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    out, err = await process.communicate(json.dumps([asdict(answer) for answer in answers]).encode())
    assert process.returncode == 0, err.decode()
    return [
        Verdict(each["wrong"], {int(position): far for position, far in each["ties"].items()})
        for each in json.loads(out)
    ]


class Judge:
    """The demo model, loaded as transformers has it."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from llmboost_worker.engine.grammar import Grammars
        from llmboost_worker.engine.interface import EngineInfo
        from llmboost_worker.models import DEMO_FOLDER
        from llmboost_worker.text import Tokenizer

        torch.set_num_threads(1)
        self.model: Any = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.load(str(DEMO_FOLDER))
        config = self.model.config
        end = self.model.generation_config.eos_token_id
        self.info = EngineInfo(
            max_model_len=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            max_num_seqs=1,
            eos_token_ids=tuple(end) if isinstance(end, list) else (end,),
            engine="",
            dtype="",
            device="",
        )
        self.grammars = Grammars(self.tokenizer.token_bytes, config.vocab_size, self.info.eos_token_ids)

    def verdict(self, answer: Answer) -> Verdict:
        import torch

        from llmboost_api.protocol.chat import ChatRequest
        from llmboost_api.protocol.completions import CompletionRequest
        from llmboost_worker.engine.interface import SequenceRequest
        from llmboost_worker.engine.transformers.sequence import Sequence
        from llmboost_worker.text import ChoiceText, encode_prompt

        body = {**answer.body, "stream": True}
        is_chat = "messages" in body
        request: Any = (ChatRequest if is_chat else CompletionRequest).model_validate(body)
        sampling = request.sampling_params("")
        prompt = encode_prompt(self.tokenizer, request.prompts()[0])
        grammar = sampling.grammar and self.grammars.compile(sampling.grammar).result()
        ids = answer.token_ids

        def after(tokens: int) -> Sequence:
            output, most = ids[:tokens], sampling.max_tokens
            asked = SequenceRequest("", prompt, sampling, answer.choice, output, most, grammar=grammar)
            return Sequence(asked, self.info, 0)

        verdict = Verdict()
        with torch.inference_mode():
            scores = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        for position, token in enumerate(ids):
            sequence = after(position)
            if position and sequence.finish_reason() is not None:
                verdict.wrong = f"goes on after token {position - 1}, which ends it"
                return verdict
            far = distance(scores[position], sequence, token)
            if far > 0:
                verdict.ties[position] = far
            if far > NEAR:
                verdict.wrong = f"token {position} is {far:.6f} from being drawn"
                return verdict
        text = ChoiceText(self.tokenizer, sampling, () if is_chat else prompt, self.info.eos_token_ids)
        said = text.replay(ids) + text.finish()
        reason = "stop" if text.stopped else after(len(ids)).finish_reason()
        if (said, reason) != (answer.text, answer.finish_reason):
            verdict.wrong = f"its tokens mean {said!r} ({reason})"
        return verdict


def distance(logits: Any, sequence: Any, token: int) -> float:
    """How far the scores [vocabulary] are from having this token drawn; 0 if it is."""
    import torch

    from llmboost_worker.engine.transformers.sampling import penalties, randomness, sampler
    from llmboost_worker.engine.transformers.sampling.parameters import Parameters

    row = logits[None].clone()
    parameters = Parameters([sequence], row.shape[1], row.device)
    penalties.apply(row, parameters)
    row -= row.max()
    sampling = sequence.sampling
    if sampling.temperature == 0:
        return float(-row[0, token])
    keys = randomness.keys(parameters.random_states, torch.tensor([sequence.num_output]))
    weights = sampler.weigh(row.clone(), parameters)
    exactly = _behind(weights, keys, token)
    if exactly == 0:
        return 0.0
    return min(exactly, *(_behind(each, keys, token) for each in _nearly(row, sequence)))


def _nearly(row: Any, sequence: Any) -> Iterator[Any]:
    """The weights [1, vocabulary] if what the filters cut off, or keep, were a little more or less."""
    import msgspec

    from llmboost_worker.engine.transformers.sampling import sampler
    from llmboost_worker.engine.transformers.sampling.parameters import COLDEST, Parameters

    sampling = sequence.sampling
    every = (row / max(sampling.temperature, COLDEST)).clamp(min=sampler.LEAST).exp()
    for more in (0, -NEAR, NEAR):
        changes: dict[str, float] = {"min_p": sampling.min_p * (1 + more)}
        if sampling.top_p < 1:
            changes["top_p"] = min(1.0, sampling.top_p * (1 + more))
        moved = copy.copy(sequence)
        moved.sampling = msgspec.structs.replace(sampling, **changes)
        kept = sampler.weigh(row.clone(), Parameters([moved], row.shape[1], row.device))
        for edge in (-NEAR, NEAR):
            yield every * (every >= kept[kept > 0].min() * (1 + edge))


def _behind(weights: Any, keys: Any, token: int) -> float:
    """How far a token's score is behind that of the race's winner, first of the blocks, then inside."""
    import torch

    from llmboost_worker.engine.transformers.sampling import randomness, sampler

    padded = torch.nn.functional.pad(weights, (0, -weights.shape[1] % sampler.BLOCK))[0].double()
    blocks = padded.view(-1, sampler.BLOCK)
    numbers = torch.arange(max(sampler.BLOCK, len(blocks)))
    block = token // sampler.BLOCK

    def behind(rates: Any, candidates: Any, mine: int) -> float:
        scores = rates.log() - randomness.exponentials(keys, candidates[None])[0].log()
        return float(scores.max() - scores[mine])

    between = behind(blocks.sum(1), numbers[: len(blocks)], block)
    tokens = block * sampler.BLOCK + numbers[: sampler.BLOCK]
    within = behind(blocks[block], tokens + len(blocks), token % sampler.BLOCK)
    far = max(between, within)
    return math.inf if math.isnan(far) else far


def main() -> None:
    judge_ = Judge()
    print(json.dumps([asdict(judge_.verdict(Answer(**answer))) for answer in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
