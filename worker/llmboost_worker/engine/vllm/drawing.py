"""Draws the tokens, in vLLM's process, by the transformers engine's own sampler.

vLLM seeds a generator per request whose state moves with each token, so that a sequence that was resumed on
another worker would draw something else. And penalties would take what an earlier attempt emitted for prompt.
So to vLLM every sequence is greedy, and this, a logits processor, decides what is most likely: it applies the
request's bias, penalties, temperature and filters, draws by (seed, choice, position), and puts the drawn
token on top. The log probabilities that vLLM reports it has computed before.
"""

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from llmboost.jobs import Grammar
from llmboost_worker.engine.grammar import Compiled, Grammars, MatcherThread
from llmboost_worker.engine.interface import EngineInfo
from llmboost_worker.engine.transformers.sampler import Sampler
from llmboost_worker.engine.transformers.sequence import Sequence
from llmboost_worker.engine.vllm import vocabulary
from llmboost_worker.engine.vllm.complaints import Outbox
from llmboost_worker.engine.vllm.params import EXTRA, decode


class Row:
    """A sequence in vLLM's batch."""

    def __init__(self, sequence: Sequence, output_ids: list[int]) -> None:
        self.sequence = sequence
        self._output_ids = output_ids
        """vLLM's own list, to which it appends what was drawn."""
        self._seen = 0

    @property
    def is_plain(self) -> bool:
        """The model's most likely token is drawn, whatever has been before."""
        sequence = self.sequence
        return (
            sequence.sampling.temperature == 0
            and not len(sequence.bias_ids)
            and sequence.counts is None
            and sequence.matcher is None
            and sequence.num_output >= sequence.sampling.min_tokens
        )

    def catch_up(self) -> Sequence:
        """The sequence with all that has been drawn."""
        for token in self._output_ids[self._seen :]:
            self.sequence.append(token)
        self._seen = len(self._output_ids)
        return self.sequence


class KeyedDrawing(LogitsProcessor):
    """Made by vLLM, once in each process that computes logits."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, Row] = {}
        """By their place in the batch."""
        self._sampler = Sampler()
        self._grammars: Grammars | None = None
        self._matchers = MatcherThread()
        self._on_cpu = device.type == "cpu"
        self._complaints = Outbox()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._row)
        # vLLM may not have heard of the last tokens yet where it schedules ahead, as it does on a GPU.
        if self._on_cpu:
            sequences = [row.catch_up() for row in self._rows.values()]
            self._matchers.start([(each.matcher, each.tokens) for each in sequences if each.matcher])

    def _row(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> Row | None:
        """None for what isn't ours: vLLM's own trial runs."""
        data = (params.extra_args or {}).get(EXTRA)
        if data is None or prompt_ids is None:
            return None
        return Row(decode(data, prompt_ids, self._compiled), output_ids)

    def _compiled(self, grammar: Grammar, info: EngineInfo) -> Compiled:
        """It has been compiled before by who sends it, so it can be, and most take a millisecond."""
        if self._grammars is None:
            self._grammars = Grammars(vocabulary.read, info.vocab_size, info.eos_token_ids)
        return self._grammars.compile(grammar).result()

    def apply(self, logits: Tensor) -> Tensor:
        """logits [batch, vocabulary] -> the same, changed in place."""
        places = sorted(self._rows)
        if logits.device.type != "cpu" and all(row.is_plain for row in self._rows.values()):
            return logits  # what is most likely is known, and to look at it would wait for the device
        if not places:
            return logits
        sequences = [self._rows[place].catch_up() for place in places]
        index = torch.tensor(places, device=logits.device)
        ours = logits if len(places) == len(logits) else logits[index]
        draws = self._sampler.sample(ours, sequences)
        for place, sequence, draw in zip(places, sequences, draws, strict=True):
            if draw.error is not None:
                self._complaints.send(sequence.id, draw.error, draw.is_refused)
                logits[place] = 0.0  # any token will do, but NaN would outdo it
        tokens = torch.tensor([max(0, draw.token) for draw in draws], device=logits.device)
        logits[index, tokens] = torch.inf
        return logits
