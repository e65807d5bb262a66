"""Long-CoT SFT on TRL's SFTTrainer with DeepSpeed under it, and the gate that RL waits at.

Chain styles are mixed on purpose: RL can only strengthen what the SFT model already does now and then.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rlvlm.cluster.local import become_rank, free_port, run_ranks
from rlvlm.learner.balance import CollapseWatch, LoadBalance
from rlvlm.learner.zero import gather_blocks_whole, zero_optimization
from rlvlm.policy.checkpoint import load_policy, save_policy
from rlvlm.policy.prompts import Prompt, PromptEncoder, Response, stack_images
from rlvlm.policy.trainable import Trainable, prepare
from rlvlm.recipe.errors import RunError
from rlvlm.recipe.schema import SFT, Phase, Recipe
from rlvlm.records import Chain, Task
from rlvlm.report.console import Console
from rlvlm.report.metrics import MetricsLog
from rlvlm.tasks.pools import TaskPools

GATE_FILE = "gate.json"  # beside hf/, since RL may go on in a process that holds no model
_IGNORED = -100
_BUCKET = 8  # batches that are sorted by length together: little padding, and still a random order of batches


class GateClosed(RunError):
    """The SFT model does not read pictures well enough for RL to start."""


@dataclass(frozen=True, slots=True)
class Example:
    """A task with one of its chains as token ids."""

    task: Task
    response: Response


def encode_examples(tasks: Sequence[Task], encoder: PromptEncoder, sft: SFT, seed: int) -> list[Example]:
    """`batch` examples for each step of each phase, in training order: a random task, a style by its share, batches of
    similar length. Raises RunError for a task without a chain in any style of a phase."""
    rng = random.Random(seed)
    examples: list[Example] = []
    for number, phase in enumerate(sft.phases):
        drawn = [
            _example(rng.choice(tasks), phase, f"sft.phases[{number}]", encoder, rng)
            for _ in range(phase.steps * sft.batch)
        ]
        examples += _by_similar_length(drawn, sft.batch, rng)
    return examples


def _example(task: Task, phase: Phase, key: str, encoder: PromptEncoder, rng: random.Random) -> Example:
    styles = {style: share for style, share in phase.styles.items() if style in task.chains}
    if not styles:
        raise RunError(
            f"task {task.id} has no chain in any of the styles {', '.join(phase.styles)} ({key}.styles)",
            mend="name one of its styles there, or give the data set a chain column (columns.chain)",
        )
    (style,) = rng.choices(list(styles), list(styles.values()))
    return Example(task, encoder.response(task.chains[style], task.answer))


def _by_similar_length(examples: list[Example], batch: int, rng: random.Random) -> list[Example]:
    ordered: list[Example] = []
    for start in range(0, len(examples), batch * _BUCKET):
        bucket = sorted(examples[start : start + batch * _BUCKET], key=lambda example: len(example.response.token_ids))
        batches = [bucket[i : i + batch] for i in range(0, len(bucket), batch)]
        rng.shuffle(batches)
        ordered += [example for one in batches for example in one]
    return ordered


class Collator:
    """Rows -> right-padded tensors. Labels are -100 everywhere but on the response (thinking and answer alike).

    Prompts are encoded here, when a batch needs them: with several ranks each encodes its share. blank: a prompt that
    stands behind the shortest row where no row has a picture. The vision tower's parameters are reduced and gathered by
    all ranks together: one whose batch has no picture would leave the others waiting for ever.
    """

    def __init__(
        self, examples: Sequence[Example], encoder: PromptEncoder, pad_id: int, blank: Prompt | None = None
    ) -> None:
        self._examples = examples
        self._encoder = encoder
        self._pad_id = pad_id
        self._blank = blank

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        examples = [self._examples[row["row"]] for row in rows]
        prompts = [self._encoder.prompt(example.task) for example in examples]
        responses = [example.response.token_ids for example in examples]
        lengths = [len(p.input_ids) + len(r) for p, r in zip(prompts, responses, strict=True)]
        images = [prompt.images for prompt in prompts]
        behind: dict[int, tuple[int, ...]] = {}  # row -> tokens behind its response, which nothing before them sees
        if self._blank is not None and not any(images):
            behind[lengths.index(min(lengths))] = self._blank.input_ids
            images = [self._blank.images]
        longest = max(length + len(behind.get(i, ())) for i, length in enumerate(lengths))
        input_ids = torch.full((len(examples), longest), self._pad_id)
        labels = torch.full((len(examples), longest), _IGNORED)
        attention_mask = torch.zeros((len(examples), longest), dtype=torch.long)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start, end = len(prompt.input_ids), lengths[i]
            ids = torch.tensor(prompt.input_ids + response + behind.get(i, ()))
            input_ids[i, : len(ids)] = ids
            labels[i, start:end] = input_ids[i, start:end]
            attention_mask[i, : len(ids)] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            **self._encoder.token_keywords(input_ids),
            **stack_images(images),
        }


class _Progress(TrainerCallback):
    """After every step: the experts' bias update. Every logged step: a line of metrics and of the terminal, on rank
    0."""

    def __init__(self, recipe: Recipe, balance: LoadBalance, metrics: Path | None) -> None:
        self._steps = recipe.sft.steps
        self._balance = balance
        self._log = MetricsLog(metrics) if metrics else None
        self._console = Console()
        self._collapse = CollapseWatch()
        self._start = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._balance.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self._log is None or not logs or "loss" not in logs:
            return
        seconds = time.perf_counter() - self._start
        loads = self._balance.pop_metrics()
        record = {
            "stage": "sft",
            "step": state.global_step,
            "loss": logs["loss"],
            "mean_token_accuracy": logs["mean_token_accuracy"],
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": logs["learning_rate"],
            **loads,
            "tokens_per_s": logs["num_tokens"] / seconds,
            "seconds": seconds,
        }
        self._log.write(record)
        if note := self._collapse.note(loads):
            self._console.note(note)
        self._console.sft_step(
            state.global_step, self._steps, record["loss"], record["mean_token_accuracy"], record["tokens_per_s"]
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._console.close()


def _arguments(recipe: Recipe, folder: Path) -> Any:
    from trl import SFTConfig

    sft, cuda = recipe.sft, torch.cuda.is_available()
    bf16 = recipe.policy.dtype == "bfloat16"
    return SFTConfig(
        output_dir=str(folder),
        use_cpu=not cuda,
        bf16=bf16,
        max_steps=sft.steps,
        per_device_train_batch_size=sft.batch // sft.ranks,
        learning_rate=sft.learning_rate,
        weight_decay=sft.weight_decay,
        adam_beta2=0.98,
        warmup_steps=sft.warmup_steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": sft.final_learning_rate_ratio},
        max_grad_norm=sft.grad_clip,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        router_aux_loss_coef=0.0,  # the experts' load is LoadBalance's: TRL would add a loss of the config's own
        gradient_checkpointing=recipe.learner.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_pin_memory=cuda,
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        report_to="none",
        seed=recipe.seed,
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": bf16},
            "zero_optimization": zero_optimization(recipe),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )


def _balanced(trainer: type[Any], balance: LoadBalance) -> type[Any]:
    """TRL's trainer, whose loss has the experts' balance in it."""

    class Balanced(trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(model, inputs, *args, **kwargs)
            extra = balance.count(inputs["attention_mask"])
            return (result[0] + extra, *result[1:]) if isinstance(result, tuple) else result + extra

    return Balanced


def _optimizer(trainer: Any, trainable: Trainable) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The trainer's own, without weight decay on biases and norms as it has it, with a learning rate for each group.
    Class and keywords: it makes its optimizer itself, once DeepSpeed is there."""
    kind, keywords = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    names = {name for name, _ in trainer.model.named_parameters()}
    undecayed = names - set(trainer.get_decay_parameter_names(trainer.model))
    groups = trainable.parameter_groups(undecayed)
    return kind, {"params": groups, "weight_decay": trainer.args.weight_decay, **keywords}


def train_sft(recipe: Recipe, policy: Path, target: Path, images: Path, metrics: Path) -> None:
    """Trains the checkpoint in `policy` and writes the result to `target`, on `sft.ranks` processes of this machine;
    with LoRA the adapters alone to `adapter` beside it.

    Its metrics are appended to the file `metrics` and shown on the terminal while it runs. images: where pictures may
    lie.
    """
    run_ranks(_train_rank, recipe.sft.ranks, recipe.model_dump_json(), policy, target, images, metrics, free_port())


def _train_rank(
    rank: int, recipe_json: str, policy: Path, target: Path, images: Path, metrics: Path, port: int
) -> None:
    recipe = Recipe.model_validate_json(recipe_json)
    become_rank(rank, recipe.sft.ranks, port, recipe.threads)
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from trl import SFTTrainer

    disable_progress_bars()
    model, processor = load_policy(str(policy), recipe.policy.dtype)
    pools = TaskPools(recipe, images)
    encoder = PromptEncoder(processor, pools.store, model.config)
    examples = encode_examples(pools.sft(), encoder, recipe.sft, recipe.seed)
    trainable = prepare(model, recipe, "sft")
    balance = LoadBalance(model, encoder.family, recipe.learner.balance, frozen=not trainable.trains("router"))
    gather_blocks_whole(model, encoder.family)
    pictures = any(example.task.images for example in examples)
    blank = encoder.blank() if recipe.sft.ranks > 1 and pictures else None
    trainer = _balanced(SFTTrainer, balance)(
        model=model,
        args=_arguments(recipe, target.parent),
        # The rows are numbers: pictures and token ids stay where they are, one copy for all examples of a task. TRL
        # takes a data set with a column `image` for one of pictures and leaves its preparation to the collator.
        train_dataset=Dataset.from_dict({"row": range(len(examples)), "image": [None] * len(examples)}),
        data_collator=Collator(examples, encoder, processor.tokenizer.pad_token_id, blank),
        processing_class=processor,
        callbacks=[_Progress(recipe, balance, metrics if rank == 0 else None)],
    )
    trainer.optimizer_cls_and_kwargs = _optimizer(trainer, trainable)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    accuracy = reading_accuracy(trainer.model_wrapped, pools.gate(), encoder)
    state = {name: tensor for name, tensor in trainable.state() if rank == 0}
    if trainable.adapters:
        trainable.save_adapter(target.parent / "adapter")
    if rank == 0:
        save_policy(model, processor, target, state)
        (target.parent / GATE_FILE).write_text(json.dumps({"reading_accuracy": accuracy}) + "\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@torch.no_grad()
def reading_accuracy(model: torch.nn.Module, tasks: Sequence[Task], encoder: PromptEncoder, batch: int = 48) -> float:
    """Teacher-forced accuracy (share of argmax hits) on the words of the chains that state what was seen; on the whole
    response where a task's chains mark none. NaN if there is no chain at all."""
    model.eval()
    examples = [Example(task, encoder.response(chain, task.answer)) for task in tasks for chain in _reading_chain(task)]
    collate = Collator(examples, encoder, pad_id=0)
    hits = total = 0
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        inputs = collate([{"row": row} for row in range(start, start + len(part))])
        labels = inputs.pop("labels")
        hit = model(**_fitting(inputs, model), use_cache=False).logits[:, :-1].argmax(-1).cpu() == labels[:, 1:]
        for i, example in enumerate(part):
            seen_T = example.response.seen_T
            wanted = torch.tensor(seen_T if any(seen_T) else [True] * len(seen_T))
            first = len(encoder.prompt(example.task).input_ids) - 1
            hits += int(hit[i, first : first + len(wanted)][wanted].sum())
            total += int(wanted.sum())
    return hits / total if total else float("nan")


def _fitting(inputs: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """On the model's device, pictures in its dtype."""
    one = next(model.parameters(), torch.empty(0))
    moved = {name: tensor.to(one.device) for name, tensor in inputs.items()}
    return {name: t.to(one.dtype) if t.is_floating_point() else t for name, t in moved.items()}


def _reading_chain(task: Task) -> list[Chain]:
    """The chain to measure reading on: the shortest that says what is seen, because a longer one may repeat itself, and
    what can be copied from the chain need not be read. Without any such chain the shortest of all."""
    shortest_first = sorted(task.chains.values(), key=lambda chain: len(chain.text))
    return ([chain for chain in shortest_first if chain.seen] or shortest_first)[:1]


def read_gate(checkpoint: Path) -> float:
    """The reading accuracy that was measured when SFT wrote `checkpoint` (its hf/ folder)."""
    return float(json.loads((checkpoint.parent / GATE_FILE).read_text())["reading_accuracy"])


def check_gate(accuracy: float, recipe: Recipe) -> None:
    """Raises GateClosed if the SFT model misreads too many words, or if there is nothing to measure it on (NaN)."""
    if math.isnan(accuracy):
        raise GateClosed(
            "no held-out task has a chain to measure reading on",
            mend="give the data set a chain column (columns.chain), or run the stages apart: stages=[sft], then "
            "stages=[rl] with policy.model=runs/NAME/checkpoints/sft/hf",
        )
    if accuracy < recipe.sft.gate.min_accuracy:
        raise GateClosed(
            f"the SFT model reads {accuracy:.1%} of the words that state what is on held-out pictures; "
            f"sft.gate.min_accuracy = {recipe.sft.gate.min_accuracy:g} asks for more: RL cannot teach perception",
            mend="raise the steps in sft.phases or sft.examples, or lower sft.gate.min_accuracy to see for yourself",
        )
