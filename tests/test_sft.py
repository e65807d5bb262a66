"""What SFT is fed, and what the gate measures. Training itself is tested with a real run (tests/engine)."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import TINY, build, chain, picture, task

from rlvlm.policy.checkpoint import save_policy
from rlvlm.policy.prompts import PromptEncoder, Response
from rlvlm.recipe.errors import RunError
from rlvlm.recipe.load import recipe_from
from rlvlm.recipe.schema import SFT, Phase, Recipe
from rlvlm.records import Seen
from rlvlm.sft import Collator, Example, GateClosed, check_gate, encode_examples, reading_accuracy, train_sft
from rlvlm.tasks.images import ImageStore
from rlvlm.tasks.pools import TaskPools


@pytest.fixture(scope="module")
def policy():
    return build()


@pytest.fixture(scope="module")
def processor(policy):
    return policy[1]


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


@pytest.fixture
def encoder(policy, store):
    return PromptEncoder(policy[1], store, policy[0].config)


def _task(store, name, chains, answer="7", pictures=()):
    return task(name, store, "sum of digits ?", *pictures, chains=chains, answer=answer)


# --- the collator ----------------------------------------------------------------------------------------------------


def test_only_the_response_is_learned(encoder, store):
    """The whole batch by hand: prompt + response + padding."""
    long = _task(store, "a", {}, pictures=(picture(0, 32, 16),))
    short = _task(store, "b", {})
    examples = [
        Example(long, Response((300, 301, 1), (False,) * 3)),
        Example(short, Response((310, 311, 312, 313, 1), (False,) * 5)),
    ]
    batch = Collator(examples, encoder, pad_id=0)([{"row": 1}, {"row": 0}])
    p_short, p_long = (list(encoder.prompt(t).input_ids) for t in (short, long))
    pad = len(p_long) + 3 - len(p_short) - 5
    assert pad > 0
    assert batch["input_ids"].tolist() == [
        p_short + [310, 311, 312, 313, 1] + [0] * pad,
        [*p_long, 300, 301, 1],
    ]
    assert batch["labels"].tolist() == [
        [-100] * len(p_short) + [310, 311, 312, 313, 1] + [-100] * pad,
        [-100] * len(p_long) + [300, 301, 1],
    ]
    width = len(p_long) + 3
    assert batch["attention_mask"].tolist() == [[1] * (width - pad) + [0] * pad, [1] * width]


def test_a_batch_without_pictures_gets_a_blank_one_that_changes_nothing(policy, encoder, store):
    """Behind the shortest row; for ranks whose tower must take part."""
    tasks = [_task(store, "a", {}), _task(store, "b", {})]
    responses = (Response((300, 301, 302, 1), (False,) * 4), Response((310, 1), (False,) * 2))
    examples = [Example(t, r) for t, r in zip(tasks, responses, strict=True)]
    rows, blank = [{"row": 0}, {"row": 1}], encoder.blank()
    plain, filled = Collator(examples, encoder, 0)(rows), Collator(examples, encoder, 0, blank)(rows)
    prompt = list(encoder.prompt(tasks[1]).input_ids)
    whole = [*prompt, 310, 1, *blank.input_ids]
    assert filled["input_ids"][1].tolist() == whole
    assert filled["labels"][1].tolist() == [-100] * len(prompt) + [310, 1] + [-100] * len(blank.input_ids)
    assert filled["attention_mask"].sum(1).tolist() == [len(prompt) + 4, len(whole)]
    assert torch.equal(filled["image_grid_thw"], blank.images["image_grid_thw"])
    model, (width, ends) = policy[0], (plain["labels"].shape[1], (len(prompt) + 4, len(prompt) + 2))
    with torch.no_grad():
        logits = [model(**{k: v for k, v in one.items() if k != "labels"}).logits[:, :width] for one in (plain, filled)]
    for row, end in enumerate(ends):
        torch.testing.assert_close(logits[0][row, :end], logits[1][row, :end], atol=1e-6, rtol=1e-5)
    pictured = Collator(
        [Example(_task(store, "c", {}, pictures=(picture(0, 32, 16),)), responses[0])], encoder, 0, blank
    )
    assert len(pictured([{"row": 0}])["image_grid_thw"]) == 1


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_ranks_with_and_without_pictures_do_not_wait_for_each_other(tmp_path):
    """SFT under ZeRO-2 and ZeRO-3, one row a rank and step: every other task has a picture. Both stages end with the
    same weights."""
    rows = [{"prompt": f"question {i} ?", "answer": "7", "chain": f"so {i}", "image": None} for i in range(80)]
    for i in range(0, 80, 2):
        picture(i, 32, 16).save(tmp_path / f"{i}.png")
        rows[i]["image"] = f"{i}.png"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = _with_pictures(tmp_path, 2)
    pools, (model, processor) = TaskPools(recipe, tmp_path / "images"), build()
    examples = encode_examples(
        pools.sft(), PromptEncoder(processor, pools.store, model.config), recipe.sft, recipe.seed
    )
    pictured = [bool(example.task.images) for example in examples]
    assert any(first != second for first, second in zip(pictured[::2], pictured[1::2], strict=True))
    ends = []
    for stage in (2, 3):
        recipe = _with_pictures(tmp_path, stage)
        start, target = tmp_path / "start", tmp_path / f"z{stage}" / "hf"
        save_policy(*build(spread=0.2), start)
        train_sft(recipe, start, target, tmp_path / "images", tmp_path / "metrics.jsonl")
        ends.append(load_file(target / "model.safetensors"))
    begin = load_file(start / "model.safetensors")
    for name in begin:
        assert not torch.equal(begin[name], ends[0][name]), name
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-5, rtol=1e-4)


def _with_pictures(folder: Path, zero_stage: int) -> Recipe:
    columns = {"image": "image", "chain": "chain"}
    recipe = recipe_from(
        {
            "name": "test",
            "output": str(folder),
            "policy": {"tiny": TINY.model_dump()},
            "tasks": {"train": [{"dataset": str(folder / "data.jsonl"), "columns": columns, "reward": "exact"}]},
            "sft": {"examples": 12, "batch": 2, "ranks": 2, "phases": [{"steps": 6}], "gate": {"tasks": 2}},
            "learner": {"zero_stage": zero_stage},
            "evaluation": {"tasks": 2},
            "rl": {"pool": 4, "prompts": 2, "minibatches": 1},
        }
    )
    return recipe


def test_pictures_come_in_the_order_of_the_rows(encoder, store):
    tasks = [_task(store, str(i), {}, pictures=(picture(i, 16 * (i + 1), 16),)) for i in range(3)]
    examples = [Example(t, Response((300, 1), (False, False))) for t in tasks]
    batch = Collator(examples, encoder, pad_id=0)([{"row": 2}, {"row": 0}])
    assert batch["image_grid_thw"].tolist() == [[1, 2, 6], [1, 2, 2]]
    expected = torch.cat([encoder.prompt(tasks[i]).images["pixel_values"] for i in (2, 0)])
    assert torch.equal(batch["pixel_values"], expected)
    assert (batch["input_ids"] == 8).sum(1).tolist() == [3, 1]


# --- the examples ----------------------------------------------------------------------------------------------------

_STYLES = {"short": chain("a1"), "medium": chain("a1", "7"), "verbose": chain("a1", "7", "check", "7")}


def _styles(examples, encoder):
    """Style of each example, told by the length of its response (chain, </think>, answer, end)."""
    return [{4: "short", 5: "medium", 7: "verbose"}[len(example.response.token_ids)] for example in examples]


def test_phases_follow_each_other_with_their_own_shares(encoder, store):
    tasks = [_task(store, str(i), _STYLES) for i in range(5)]
    mix = {"short": 1.0, "medium": 2.0, "verbose": 5.0}
    sft = SFT(batch=8, phases=(Phase(steps=20, styles={"medium": 3.0}), Phase(steps=400, styles=mix)))
    examples = encode_examples(tasks, encoder, sft, seed=0)
    styles = _styles(examples, encoder)
    assert len(examples) == sft.steps * 8 == 420 * 8
    assert set(styles[: 20 * 8]) == {"medium"}
    counts = Counter(styles[20 * 8 :])
    for style, share in {"short": 1 / 8, "medium": 2 / 8, "verbose": 5 / 8}.items():
        deviation = math.sqrt(3200 * share * (1 - share))
        assert abs(counts[style] - 3200 * share) < 4 * deviation
    drawn = Counter(example.task.id for example in examples)
    assert all(abs(drawn[t.id] - 3360 / 5) < 4 * math.sqrt(3360 * 0.2 * 0.8) for t in tasks)


def test_a_task_without_a_style_shares_it_out_among_its_own(encoder, store):
    tasks = [_task(store, "x", {"medium": _STYLES["medium"], "verbose": _STYLES["verbose"]})]
    sft = SFT(batch=8, phases=(Phase(steps=100, styles={"short": 10.0, "medium": 1.0, "verbose": 3.0}),))
    counts = Counter(_styles(encode_examples(tasks, encoder, sft, seed=0), encoder))
    assert counts.keys() == {"medium", "verbose"}
    assert abs(counts["verbose"] - 600) < 4 * math.sqrt(800 * 0.75 * 0.25)


def test_examples_are_a_function_of_the_seed(encoder, store):
    tasks = [_task(store, str(i), _STYLES) for i in range(5)]
    sft = SFT(batch=4, phases=(Phase(steps=10),))
    one, same, other = (encode_examples(tasks, encoder, sft, seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_batches_hold_similar_lengths_and_come_in_random_order(encoder, store):
    """Chains of 1 to 64 words: of 8 batches that are sorted together, each covers an eighth of the drawn lengths."""
    tasks = [_task(store, str(n), {"short": chain(*["a1"] * n)}) for n in range(1, 65)]
    sft = SFT(batch=8, phases=(Phase(steps=16, styles={"short": 1.0}),))
    lengths = [len(example.response.token_ids) for example in encode_examples(tasks, encoder, sft, seed=3)]
    for bucket in (lengths[:64], lengths[64:]):
        batches = sorted((bucket[i : i + 8] for i in range(0, 64, 8)), key=min)
        for lower, upper in pairwise(batches):
            assert max(lower) <= min(upper)
    starts = [lengths[i] for i in range(0, 64, 8)]
    assert starts != sorted(starts) and starts != sorted(starts, reverse=True)


def test_a_task_without_any_wanted_style_is_an_error_that_names_it(encoder, store):
    tasks = [_task(store, "digits/17", {"long": _STYLES["short"]})]
    sft = SFT(phases=(Phase(steps=1, styles={"short": 1.0, "medium": 1.0}),))
    with pytest.raises(RunError, match=r"digits/17 .*short, medium .*sft\.phases\[0\]\.styles.*chain"):
        encode_examples(tasks, encoder, sft, seed=0)


# --- the gate --------------------------------------------------------------------------------------------------------


class Bigrams(torch.nn.Module):
    """A policy that always says the same after the same token: after the first of a pair the second; else token 0."""

    def __init__(self, pairs, tokenizer, vocabulary):
        super().__init__()
        self.after = torch.zeros(vocabulary, dtype=torch.long)
        for first, second in pairs:
            self.after[_id(tokenizer, first)] = _id(tokenizer, second)
        self.vocabulary = vocabulary

    def forward(self, input_ids, attention_mask, use_cache, **images):
        assert (input_ids[attention_mask == 0] == 0).all()
        return SimpleNamespace(logits=torch.nn.functional.one_hot(self.after[input_ids], self.vocabulary).float())


def _id(tokenizer, text):
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


def _accuracy(pairs, tasks, encoder, processor, batch=48):
    return reading_accuracy(Bigrams(pairs, processor.tokenizer, len(processor.tokenizer)), tasks, encoder, batch)


@pytest.mark.parametrize("batch", [1, 2, 48])
def test_accuracy_on_the_words_that_state_what_was_seen(encoder, store, processor, batch):
    """Seen: 3 after a1 (right), 4 after a2 (wrong), 5 after a3 (right), 3 after a1 (right): 3 of 4."""
    one = chain("a1", Seen("3"), "a2", Seen("4"), "a3", Seen("5"))
    two = chain("check", "a1", Seen("3"))
    tasks = [_task(store, "a", {"s": one}, pictures=(picture(0, 32, 16),)), _task(store, "b", {"s": two})]
    pairs = [("a1", " 3"), (" a1", " 3"), (" a2", " 9"), (" a3", " 5")]
    assert _accuracy(pairs, tasks, encoder, processor, batch) == 3 / 4


def test_the_shortest_chain_that_says_what_is_seen_is_read(encoder, store, processor):
    """Longer chains may copy from themselves; a shorter one that marks nothing measures nothing."""
    chains = {
        "verbose": chain("a1", Seen("3"), "check", "a1", Seen("3"), "so", Seen("3")),
        "short": chain("a1", "3"),
        "medium": chain("check", "a2", Seen("3"), Seen("4")),
    }
    pairs = [("a1", " 3"), (" a1", " 3"), (" so", " 3"), (" a2", " 3"), (" 3", " 9")]
    assert _accuracy(pairs, [_task(store, "a", chains)], encoder, processor) == 1 / 2


def test_without_marks_the_whole_response_counts(encoder, store, processor):
    """a1 3 </think> 7 <end>: right are 3, </think> and the end of turn: 3 of 5."""
    pairs = [("a1", " 3"), (" 3", "</think>"), ("7", "<|im_end|>")]
    assert _accuracy(pairs, [_task(store, "a", {"s": chain("a1", "3")})], encoder, processor) == 3 / 5


def test_without_any_chain_there_is_nothing_to_measure(encoder, store, processor):
    assert math.isnan(_accuracy([], [_task(store, "a", {})], encoder, processor))


def _recipe(least):
    train = [{"generator": "digits_sum"}]
    return recipe_from({"name": "x", "tasks": {"train": train}, "sft": {"gate": {"min_accuracy": least}}})


def test_the_gate_opens_at_its_limit_and_says_why_it_does_not():
    check_gate(0.9, _recipe(0.9))
    with pytest.raises(GateClosed) as caught:
        check_gate(0.8512, _recipe(0.9))
    message = str(caught.value)
    assert "85.1%" in message and "sft.gate.min_accuracy = 0.9" in message and "sft.examples" in message
