"""Each sampling parameter against transformers' processors, and the draw against its distribution."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmboost_worker.engine.interface import EngineInfo
from llmboost_worker.engine.transformers.sampling import filters, penalties, randomness
from llmboost_worker.engine.transformers.sampling.parameters import Parameters
from llmboost_worker.engine.transformers.sampling.sampler import BLOCK, Draw, Sampler, race, weigh
from llmboost_worker.engine.transformers.sequence import Sequence
from tests.unit.engine_models import EOS, VOCAB, request

PROMPT = [5, 9, 9, 40]
OUTPUT = [7, 9, 7, 7, 120]


def info(vocab_size: int = VOCAB) -> EngineInfo:
    return EngineInfo(512, vocab_size, 32, (EOS,), "transformers", "float32", "cpu")


def sequence(vocab_size: int = VOCAB, output_ids: list[int] | None = None, **sampling: Any) -> Sequence:
    sampling.setdefault("temperature", 1.0)
    ids = OUTPUT if output_ids is None else output_ids
    return Sequence(request("s", PROMPT, ids, max_tokens=400, **sampling), info(vocab_size), 0)


def random_logits(rows: int, vocab_size: int = VOCAB, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Draw]:
    """By a sampler that has seen no other batch."""
    return Sampler().sample(logits, sequences)


def probabilities(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """What the sampler draws by. [rows, vocabulary]"""
    logits = logits.clone()
    parameters = Parameters(sequences, logits.shape[1], logits.device)
    penalties.apply(logits, parameters)
    weights = weigh(logits - logits.amax(1, keepdim=True), parameters)
    return weights / weights.sum(1, keepdim=True)


def expected(logits: Tensor, one: Sequence) -> Tensor:
    """The same by transformers' processors, for one row. [vocabulary]"""
    p = one.sampling
    steps = LogitsProcessorList()
    if p.logit_bias:
        steps.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in p.logit_bias.items()]))
    if p.min_tokens:
        steps.append(MinNewTokensLengthLogitsProcessor(len(PROMPT), p.min_tokens, [EOS, *p.stop_token_ids]))
    if p.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    scores = steps(torch.tensor([one.tokens]), logits[None].clone())
    counts = torch.bincount(torch.tensor(one.tokens[len(PROMPT) :], dtype=torch.int64), minlength=len(logits))
    scores = scores - counts * p.frequency_penalty - (counts > 0) * p.presence_penalty  # OpenAI's formula
    warpers = LogitsProcessorList()
    if p.temperature != 1:
        warpers.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        warpers.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        warpers.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        warpers.append(MinPLogitsWarper(p.min_p))
    return warpers(torch.tensor([one.tokens]), scores).softmax(-1)[0]


PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.9},
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"top_p": 1e-300},
    {"min_p": 0.1},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 0.8},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 0.3, "frequency_penalty": 0.2, "repetition_penalty": 1.2},
    {"logit_bias": {7: 3.0, 50: -100.0}},
    {"logit_bias": {7: 3.0}, "repetition_penalty": 1.3, "top_p": 0.9},
    {"min_tokens": 6},
    {"min_tokens": 5},
    {"min_tokens": 10, "stop_token_ids": (7, 30)},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_each_parameter_gives_the_distribution_of_its_reference(parameters: dict[str, Any]) -> None:
    logits, one = random_logits(1), sequence(**parameters)
    drawn, reference = probabilities(logits, [one])[0], expected(logits[0], one)
    torch.testing.assert_close(drawn, reference, rtol=1e-4, atol=1e-7)
    assert torch.equal(drawn > 0, reference > 0), "what is excluded must not be drawn, however improbable"


def test_every_row_of_a_mixed_batch_is_drawn_by_its_own_parameters() -> None:
    """All parameter sets in one batch give what each gives alone."""
    sequences = [sequence(**parameters) for parameters in PARAMETERS]
    logits = random_logits(len(sequences))
    for row, one in zip(probabilities(logits, sequences), sequences, strict=True):
        index = sequences.index(one)
        torch.testing.assert_close(row, expected(logits[index], one), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize(
    "parameters", [{"top_p": 0.9}, {"top_k": 1500}, {"top_k": 1500, "top_p": 0.9}], ids=str
)
def test_filters_are_exact_beyond_the_candidates(scale: float, parameters: dict[str, Any]) -> None:
    """A flat distribution over a large vocabulary needs more than the top 1,024, a peaked one doesn't."""
    logits, one = random_logits(2, 5000, scale), sequence(5000, **parameters)
    peaked = sequence(5000, top_p=0.5)
    rows = probabilities(logits, [one, peaked])
    for row, logit, each in zip(rows, logits, [one, peaked], strict=True):
        # float32 sums in the reference decide the last token kept: allow that one to differ
        assert int(((row > 0) != (expected(logit, each) > 0)).sum()) <= 1
        torch.testing.assert_close(row, expected(logit, each), rtol=1e-2, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.25, 0.2500001, 0.3, 1.0]), min_size=9, max_size=9),
        min_size=1,
        max_size=4,
    ).map(lambda rows: [[*row, 1.0] for row in rows]),
    p=st.sampled_from([1e-300, 1e-9, 0.1, 0.5, 0.9, 0.999999]),
)
def test_the_digits_of_a_threshold_are_those_that_sorting_finds(rows: list[list[float]], p: float) -> None:
    weights, shares = torch.tensor(rows), torch.full((len(rows), 1), p, dtype=torch.float64)
    assert torch.equal(filters._by_digits(weights, shares), filters._by_sorting(weights, shares))


def test_rows_are_filtered_apart_in_whatever_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.cat(
        [random_logits(1, 5000, scale, seed=i) for i, scale in enumerate([0.01, 5.0, 1.0])]
    ).exp()
    weights /= weights.amax(1, keepdim=True)
    shares = torch.tensor([[0.9], [0.5], [0.99]], dtype=torch.float64)
    together = filters.nucleus(weights, shares)
    monkeypatch.setattr(filters, "CACHED", 1)
    assert torch.equal(filters.nucleus(weights, shares), together)
    assert torch.equal(filters._by_sorting(weights, shares), together)


@pytest.mark.parametrize("size", [5 * filters.BLOCK, 5000])
@pytest.mark.parametrize("k", [1, 5, 18])
def test_the_largest_of_blocks_are_the_largest(size: int, k: int) -> None:
    logits = random_logits(8, size)
    logits[0, -k:] = 100  # at the end, where there may be no whole block
    logits[1, :k] = 100
    values, indices = filters.largest(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(logits.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)


def concentrated(weights: list[float]) -> Tensor:
    """Logits of a distribution over the first tokens of the vocabulary. [1, vocabulary]"""
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, : len(weights)] = torch.tensor(weights).log()
    return logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_of_many_seeds_follow_the_distribution(temperature: float) -> None:
    """Pearson's chi-square stays below its 99.9 % quantile for 9 degrees of freedom."""
    draws, weights = 4000, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    sequences = [sequence(temperature=temperature, seed=seed) for seed in range(draws)]
    drawn = sample(concentrated(weights).repeat(draws, 1), sequences)
    counts = torch.bincount(torch.tensor([draw.token for draw in drawn]), minlength=10)
    share = (torch.tensor(weights).log() / temperature).softmax(0) * draws
    assert float(((counts - share) ** 2 / share).sum()) < 27.9


def key(state: int, position: int) -> Tensor:
    """[1]"""
    return randomness.keys(torch.tensor([state]), torch.tensor([position]))


def uniform(state: int, position: int, candidate: int = 0) -> float:
    """A candidate's random number, spread evenly over (0, 1)."""
    return math.exp(-float(randomness.exponentials(key(state, position), torch.tensor([[candidate]]))))


def test_positions_choices_and_candidates_of_one_seed_draw_independently() -> None:
    """Pairs of consecutive positions, of neighbouring choices and of neighbouring candidates fill a 4 x 4
    table evenly (chi-square, 15 degrees of freedom, 99.9 %)."""
    states = [randomness.stream(7, choice) for choice in range(100)]
    table = [[uniform(state, position) for position in range(41)] for state in states]
    along = [(row[i], row[i + 1]) for row in table for i in range(0, 40, 2)]
    across = [(table[i][p], table[i + 1][p]) for i in range(0, 100, 2) for p in range(40)]
    candidates = [[uniform(states[0], p, n) for n in range(80)] for p in range(40)]
    among = [(row[n], row[n + 1]) for row in candidates for n in range(0, 80, 2)]
    for pairs in (along, across, among):
        cells = torch.bincount(torch.tensor([int(4 * a) * 4 + int(4 * b) for a, b in pairs]), minlength=16)
        share = len(pairs) / 16
        assert float(((cells - share) ** 2 / share).sum()) < 37.7


def test_random_numbers_are_splitmix64s() -> None:
    """The published first outputs for state 1234567."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [randomness.mix(1234567 + n * randomness.GAMMA) for n in range(1, 5)] == outputs


@given(st.integers(-(2**63), 2**64), st.integers(0, 1000), st.integers(0, 10**6), st.integers(0, 2**33))
def test_random_numbers_of_a_tensor_are_those_of_the_hash(
    seed: int, choice: int, position: int, candidate: int
) -> None:
    """Signed products that wrap around give the bits that Python's integers give; none is 0 or infinite."""
    state = randomness.stream(seed, choice)
    of_position = randomness.mix(state + (position + 1) * randomness.GAMMA)
    bits = randomness.mix(of_position + (candidate + 1) * randomness.GAMMA)
    drawn = float(randomness.exponentials(key(state, position), torch.tensor([[candidate]])))
    assert drawn == pytest.approx(-math.log(((bits >> 12) + 0.5) / 2**52))
    assert 0 < drawn < 40


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.3, 1.0]), min_size=1, max_size=700).filter(any),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_token_of_weight_0_is_never_drawn(weights: list[float], seed: int) -> None:
    assert weights[int(race(torch.tensor([weights]), key(seed, 0)))] > 0


def test_tokens_of_all_blocks_are_drawn_by_their_weights() -> None:
    """Over more than one block, and an incomplete one: Pearson's chi-square, 9 degrees of freedom, 99.9 %."""
    draws, size = 4000, 2 * BLOCK + 10
    tokens = torch.tensor([0, 1, 100, 255, 256, 257, 400, 511, 512, size - 1])
    weights = torch.zeros(size)
    weights[tokens] = torch.arange(1.0, 11.0)
    keys = torch.cat([key(randomness.stream(seed, 0), 3) for seed in range(draws)])
    counts = torch.bincount(race(weights.repeat(draws, 1), keys), minlength=size)
    share = weights / weights.sum() * draws
    assert int(counts.sum()) == int(counts[tokens].sum())
    assert float(((counts - share)[tokens] ** 2 / share[tokens]).sum()) < 27.9


def test_rounding_hardly_ever_changes_a_draw() -> None:
    """Probabilities that differ in their last digits, as those of another batch do, give the same tokens.
    (By inversion of the cumulative distribution, 15 of these 8,000 differ.)"""
    draws, size = 8000, 5000
    weights = (torch.randn(1, size, generator=torch.Generator().manual_seed(0)) * 2).exp().repeat(draws, 1)
    noise = torch.randn(draws, size, generator=torch.Generator().manual_seed(1))
    keys = torch.cat([key(randomness.stream(seed, 0), 0) for seed in range(draws)])
    same = race(weights, keys) == race(weights * (1 + 1e-5 * noise), keys)
    assert int((~same).sum()) <= 1


def test_neighbours_in_the_batch_do_not_change_a_draw() -> None:
    logits = random_logits(16)
    sequences = [sequence(seed=i, **PARAMETERS[i % len(PARAMETERS)]) for i in range(16)]
    together = [draw.token for draw in sample(logits.clone(), sequences)]
    alone = [sample(logits[i : i + 1].clone(), [sequences[i]])[0].token for i in range(16)]
    assert together == alone


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-5, 1e-4])
def test_cold_means_greedy(temperature: float) -> None:
    logits = random_logits(50, scale=100.0)
    sequences = [sequence(temperature=temperature, seed=seed) for seed in range(50)]
    drawn = [draw.token for draw in sample(logits.clone(), sequences)]
    assert drawn == logits.argmax(1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("row", "error"),
    [
        (torch.full((VOCAB,), -torch.inf), "probability of 0"),
        (torch.zeros(VOCAB).index_fill(0, torch.tensor([3]), torch.nan), "NaN"),
        (torch.zeros(VOCAB).index_fill(0, torch.tensor([3]), torch.inf), "infinite"),
    ],
    ids=["excluded", "nan", "infinite"],
)
def test_a_row_without_a_distribution_fails_alone(row: Tensor, error: str, temperature: float) -> None:
    logits = random_logits(3)
    sequences = [sequence(seed=i, temperature=temperature, top_p=0.9, top_logprobs=1) for i in range(3)]
    sound = sample(logits.clone(), sequences)
    logits[1] = row
    drawn = sample(logits, sequences)
    assert error in (drawn[1].error or "")
    assert [drawn[0], drawn[2]] == [sound[0], sound[2]]


def test_min_tokens_that_exclude_everything_are_an_error() -> None:
    one = sequence(min_tokens=100, stop_token_ids=tuple(range(VOCAB)))
    assert "min_tokens" in (sample(random_logits(1), [one])[0].error or "")


def test_stop_ids_outside_the_vocabulary_are_no_matter() -> None:
    one = sequence(min_tokens=100, stop_token_ids=(VOCAB, -1, 10**9))
    assert sample(random_logits(1), [one])[0].error is None


def test_logprobs_are_those_of_the_model_itself() -> None:
    """log_softmax of the raw logits, whatever penalties, bias, temperature and filters made of them."""
    changes = {"temperature": 0.5, "top_k": 5, "logit_bias": {8: 50.0}, "repetition_penalty": 1.5}
    wanted = [None, 0, 1, 5]
    logits = random_logits(4)
    raw = logits.log_softmax(-1)
    drawn = sample(logits, [sequence(top_logprobs=k, **changes) for k in wanted])
    assert [draw.token for draw in drawn] == [8] * 4
    assert drawn[0].logprobs is None
    for row, (k, draw) in list(enumerate(zip(wanted, drawn, strict=True)))[1:]:
        assert draw.logprobs is not None
        assert draw.logprobs.logprob == pytest.approx(float(raw[row, 8]))
        best = raw[row].topk(k or 0)
        assert [id for id, _ in draw.logprobs.top] == best.indices.tolist()
        assert [value for _, value in draw.logprobs.top] == pytest.approx(best.values.tolist())


def test_logprobs_of_more_tokens_than_there_are_are_those_of_all() -> None:
    draw = sample(random_logits(1), [sequence(top_logprobs=VOCAB + 10)])[0]
    assert draw.logprobs is not None
    assert len(draw.logprobs.top) == VOCAB


def test_a_batch_that_changes_is_drawn_by_what_its_sequences_ask() -> None:
    """One sampler for all steps: whether the batch is the one before, has lost or gained a sequence or has
    them in another order, each draws what it draws alone."""
    sampler = Sampler()
    sequences = [sequence(seed=i, **PARAMETERS[i % len(PARAMETERS)]) for i in range(24)]
    some, others = sequences[:20], sequences[2:22]
    batches = [some, some, others, others[:10], sequences, sequences[::-1], sequences[::-1]]
    for step, batch in enumerate(batches):
        logits = random_logits(len(batch), seed=step)
        alone = [sample(logits[i : i + 1].clone(), [one])[0].token for i, one in enumerate(batch)]
        assert [draw.token for draw in sampler.sample(logits, batch)] == alone
        for one, token in zip(batch, alone, strict=True):
            one.append(token)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_read_exactly(dtype: torch.dtype) -> None:
    """As what they are in float32, ties included."""
    logits = random_logits(8, scale=1.0).to(dtype)
    sequences = [sequence(seed=i, temperature=float(i % 2), top_logprobs=2) for i in range(8)]
    assert sample(logits.clone(), sequences) == sample(logits.float(), sequences)


def test_nothing_brings_back_a_token_that_is_held_back() -> None:
    changes = {"logit_bias": {EOS: 100.0}, "presence_penalty": -2.0, "frequency_penalty": -2.0}
    ones = [sequence(output_ids=[EOS, EOS], min_tokens=5, temperature=t, **changes) for t in (0.0, 1.0)]
    assert all(draw.token not in (EOS, -1) for draw in sample(random_logits(2), ones))
