"""The demo model: what its corpus promises, and what its folder holds."""

import itertools
import json
from collections import Counter
from random import Random

import pytest
from demo import chats, facts, memories, prompts, stories, sums
from demo.corpus import Document, documents, normal
from demo.manners import messy, typo
from demo.texts import phrases

from llmboost_worker.models import DEMO_FOLDER

FOLDER = DEMO_FOLDER


@pytest.fixture(scope="module")
def sample() -> list[Document]:
    return list(itertools.islice(documents(123), 3000))


def test_the_same_seed_gives_the_same_documents(sample: list[Document]) -> None:
    assert list(itertools.islice(documents(123), 200)) == sample[:200]
    assert list(itertools.islice(documents(124), 200)) != sample[:200]


def test_no_slot_is_left_unfilled(sample: list[Document]) -> None:
    for doc in sample:
        for text, _ in doc.pieces():
            assert not set(text) & set("{}"), text


def test_conversations_alternate_and_end_with_the_assistant(sample: list[Document]) -> None:
    for doc in sample:
        roles = [role for role, _ in doc.turns if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(text for role, text in doc.turns if role == "assistant")
        assert bool(doc.turns) != bool(doc.text)


def test_only_what_the_assistant_writes_is_learnt(sample: list[Document]) -> None:
    for doc in sample:
        learnt = "".join(text for text, wanted in doc.pieces() if wanted)
        if doc.turns:
            assert learnt == "".join(text + "<|im_end|>" for role, text in doc.turns if role == "assistant")
        else:
            assert learnt == doc.text + "<|endoftext|>"


def test_held_out_prompts_never_occur(sample: list[Document]) -> None:
    held_out = {normal(text) for text in prompts.HELD_OUT_PROMPTS}
    said = {normal(text) for doc in sample for role, text in doc.turns if role == "user"}
    assert not held_out & said


def test_held_out_sums_never_occur() -> None:
    rng = Random(1)
    pairs: set[tuple[int, int]] = set()
    for _ in range(20_000):
        _, answer = sums.addition(rng)
        a, b = answer.split(" = ")[0].split(" + ")
        assert not sums.held_out(int(a), int(b), None)
        pairs.add((int(a), int(b)))
    assert {(a, b) for a in range(21) for b in range(21)} <= pairs
    share = sum(sums.held_out(a, b, None) for a in range(51) for b in range(21, 51)) / (51 * 30)
    assert 0.02 < share < 0.1


def test_arithmetic_is_right() -> None:
    rng = Random(2)
    for make in (sums.addition, sums.arithmetic):
        for _ in range(3000):
            answer = make(rng)[1]
            if " = " in answer:
                left, right = answer.rstrip(".").split(" = ")
                assert eval(left) == int(right), answer
    for _ in range(500):
        first = sums.addition(rng)[1]
        if then := sums.follow_up(rng, first):
            assert then[1].startswith(first.rstrip(".").split(" = ")[1] + " ")


def test_relations_agree_with_each_other() -> None:
    assert facts.RELATIONS["day_after"].table["Sunday"] == "Monday"
    assert facts.RELATIONS["day_before"].table["Monday"] == "Sunday"
    assert facts.RELATIONS["month_after"].table["December"] == "January"
    assert facts.RELATIONS["country"].table["Paris"] == "France"
    assert len(facts.RELATIONS["capital"].table) >= 40
    assert sum(len(relation.table) for relation in facts.RELATIONS.values()) >= 400


def test_articles_fit() -> None:
    rng = Random(3)
    for _ in range(5000):
        ask, answer = facts.fact(rng)
        for text in (ask, answer):
            assert not any(wrong in text for wrong in (" a elephant", " a owl", " an dog")), text


@pytest.mark.parametrize("topic", [*stories.TOPICS, "fox", None])
def test_stories_keep_their_names_and_length(topic: str | None) -> None:
    rng = Random(4)
    for _ in range(100):
        text, slots = stories.tell(rng, topic)
        assert 50 <= len(text.split()) <= 140
        assert slots["n"] in text
        assert slots["n"] != slots["h"]
        assert text[0].isupper()
        assert text[-1] in '."!'


def test_stories_differ() -> None:
    rng = Random(5)
    told = Counter(stories.tell(rng, "ai")[0] for _ in range(2000))
    assert max(told.values()) == 1


def test_memory_answers_with_what_was_told() -> None:
    rng = Random(6)
    for _ in range(2000):
        talk = memories.Talk()
        said, _ = talk.tell(rng)
        ask, answer = talk.ask(rng)
        if "You have not told me" not in answer:
            assert any(value in answer for value in talk.known.values()), (said, ask, answer)


def test_unseen_names_are_not_made_for_the_corpus() -> None:
    rng = Random(7)
    assert not any(memories.any_name(rng).startswith(memories.HELD_OUT_NAME_START) for _ in range(20_000))


def test_typos_leave_names_and_numbers_alone() -> None:
    rng = Random(8)
    for _ in range(500):
        assert typo(rng, "Ada {x} 123 is") == "Ada {x} 123 is"
        assert "{x}" in messy(rng, "My name is {x}.", fixed=True)


def test_every_list_of_phrases_is_found() -> None:
    assert phrases("sum")
    assert phrases("story about")
    assert phrases("systems")
    assert all(chats.LISTS.values())
    assert chats.EMOJI["cat"] == "🐱"


def test_folder_is_complete_and_small() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert (FOLDER / "model.safetensors").stat().st_size <= 10_000_000
    assert set(json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"])


def test_tokenizer_gives_back_any_text() -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(FOLDER)
    rng = Random(9)
    texts = [
        "",
        " ",
        "  a  b ",
        "don ' t , you ?",
        "\t\n\r\n",
        "é é",
        "😀👩‍👩‍👧",
        "日本語",
        "\x00\x7f",
        "a<|im_end|>b",
    ]
    texts += ["".join(chr(rng.randrange(1, 0xD800)) for _ in range(20)) for _ in range(300)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer.tokenize("1234")) == 4


def test_chat_template() -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(FOLDER)
    plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "ab"}]
    parts = [
        plain[0],
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    want = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    for messages in (plain, parts):
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == want
    for bad in ({"role": "wizard", "content": "x"}, {"role": "user", "content": [{"type": "image_url"}]}):
        with pytest.raises(Exception, match=r"Unknown role: wizard|Only text"):
            tokenizer.apply_chat_template([bad], tokenize=False)


def test_template_matches_what_was_trained(sample: list[Document]) -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(FOLDER)
    for doc in sample[:100]:
        if doc.turns:
            messages = [{"role": role, "content": text} for role, text in doc.turns]
            want = "".join(text for text, _ in doc.pieces())
            assert tokenizer.apply_chat_template(messages, tokenize=False) == want


def test_untrained_weights_look_back() -> None:
    torch = pytest.importorskip("torch")
    from demo import initial, tokenizer, train

    model = train.make_model(tokenizer.make_tokenizer(0, sample=300), seed=0)
    torch.manual_seed(1)
    first, again = initial.looks_back(model)
    assert again < first - 0.5
