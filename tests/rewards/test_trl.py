"""A reward as a reward function of TRL: called by hand in all of its forms, and within a GRPOTrainer that trains."""

from __future__ import annotations

import asyncio
import logging
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rlvlm_rewards import Failure, Sample, Score, load_reward
from rlvlm_rewards.reward import Reward, wrap


def _seen_by(**columns: Any) -> list[Sample]:
    seen: list[Sample] = []

    def reward(sample: Sample) -> float:
        seen.append(sample)
        return 0.5

    assert wrap("watching", reward)(**columns) == [0.5] * len(columns["completions"])
    return sorted(seen, key=lambda sample: sample.completion)


def test_it_has_the_name_that_trl_logs() -> None:
    assert load_reward("repetition").__name__ == "repetition"


def test_texts() -> None:
    first, second = _seen_by(
        prompts=["2 + 5 ?", "a ? <think>\n"],
        completions=["x 7", "y 8"],
        answer=[7, "8"],
        level=[1, 2],
        completion_ids=[[1], [2]],
        trainer_state=SimpleNamespace(global_step=3, max_steps=4),
    )
    assert (first.completion, first.answer, first.thinking, first.progress) == ("x 7", "7", False, 0.75)
    assert first.messages == ({"role": "user", "content": "2 + 5 ?"},)
    assert (second.completion, second.answer, second.thinking) == ("y 8", "8", True)
    assert first.columns == {"answer": 7, "level": 1} and first.images == []


def test_chats_and_pictures() -> None:
    chat = [{"role": "user", "content": "how many ?"}]
    said = [[{"role": "assistant", "content": "a 7"}], [{"role": "assistant", "content": [{"text": "b 8"}]}]]
    first, second = _seen_by(prompts=[chat, chat], completions=said, solution=["7", "8"], image=["left", "right"])
    assert (first.completion, first.answer, first.images) == ("a 7", "7", ["left"])
    assert (second.completion, second.answer, second.images) == ("b 8", "8", ["right"])
    assert first.messages == chat and first.progress == 1.0


def test_positional_as_trl_documents_it() -> None:
    assert load_reward("repetition", ngram=1)(["p", "p"], ["a b", "a a"]) == [1.0, 0.5]


def test_a_sample_is_awaited_as_ever() -> None:
    assert asyncio.run(load_reward("repetition", ngram=1)(sample=Sample("a a", ""))).value == 0.5


def test_it_can_be_called_while_a_loop_runs_and_keeps_its_own() -> None:
    loops = []

    async def reward(sample: Sample) -> float:
        loops.append(asyncio.get_running_loop())
        return 1.0

    waiting = wrap("waiting", reward)

    async def main() -> list[float | None]:
        return waiting(prompts=["p"], completions=["a"])

    assert asyncio.run(main()) == [1.0]
    assert waiting(prompts=["p"], completions=["a"]) == [1.0]
    assert loops[0] is loops[1]  # connections that belong to a loop live on


def test_a_failure_is_none_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def reward(sample: Sample) -> Score:
        if sample.completion == "b":
            return Score(failure=Failure.UNPARSABLE_REFERENCE, detail=f"{sample.task} is odd")
        return Score(value=0.25, parts={"iou": 0.75 if sample.completion == "a" else 0.25})

    metrics: dict[str, float] = {}
    with caplog.at_level(logging.WARNING):
        values = wrap("mine", reward)(
            prompts=["p"] * 3, completions=["a", "b", "c"], id=["x", "y", "z"], log_metric=metrics.__setitem__
        )
    assert values == [0.25, None, 0.25]
    assert metrics == {"mine/iou": 0.5}
    assert "1 of 3 completions have no score; 1: unparsable_reference: y is odd" in caplog.text


def test_numbers_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        load_reward("repetition")(prompts=["p"], completions=["a", "b"])


def _tiny_model(folder: Path) -> tuple[Any, Any]:
    """A random Llama of two layers over the ten digits, and its tokenizer; nothing is downloaded."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *map(str, range(10))]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **sizes))
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.engine
def test_a_reward_trains_in_trl_as_it_is(tmp_path: Path) -> None:
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    model, tokenizer = _tiny_model(tmp_path)
    said: list[list[tuple[str, str]]] = []

    def listener(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        said.append(list(zip(completions, answer, strict=True)))
        return [0.0] * len(completions)

    number: Reward = load_reward("number")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[number, listener],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=32,
            num_generations=16,
            max_completion_length=1,
            logging_steps=1,
            learning_rate=0.1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1 2", "3 4"] * 4, "answer": ["3", "7"] * 4}),
        processing_class=tokenizer,
    )
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    logged = [line["rewards/number/mean"] for line in trainer.state.log_history if "rewards/number/mean" in line]
    # The one digit of a completion is the answer or it is not.
    by_hand = [statistics.fmean(completion.strip() == answer for completion, answer in step) for step in said]
    assert len(logged) == len(by_hand) == 2 and logged == pytest.approx(by_hand)
    assert 0.0 < sum(by_hand) < 2.0 and not torch.equal(before, model.lm_head.weight)
