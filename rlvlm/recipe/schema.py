"""Every key that a recipe may have, with its type, its default and its meaning. Imports no torch: `rlvlm` checks a
recipe before anything heavy loads. A key that no code reads fails a test (tests/recipe/test_keys_are_read.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlvlm.recipe.errors import ABSENT, RecipeError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]

_VISION_MULTIPLE = 16
_TINY_POSITIONS = 4096


class Section(BaseModel):
    """Strict and immutable: an unknown key, a string where a number belongs, or a later assignment is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TinyPolicy(Section):
    """The default policy: a tiny kimi_k25 (MoonViT, MLP projector, DeepSeek-V3 MoE with MLA), built on the spot."""

    hidden: PositiveInt = 96
    layers: PositiveInt = 3
    experts: PositiveInt = 8
    experts_per_token: PositiveInt = 2
    expert_width: PositiveInt = 64
    vision_hidden: PositiveInt = 48
    vision_layers: PositiveInt = 2
    patch: PositiveInt = 8


class Policy(Section):
    """model: `tiny_kimi` (built from `tiny`), a directory with a checkpoint, or a hub id."""

    model: Text = "tiny_kimi"
    dtype: Literal["float32", "bfloat16"] = "float32"
    tiny: TinyPolicy = TinyPolicy()


class Columns(Section):
    """Which column of a data set carries what. `image` may be absent (text-only rows); a column may hold one picture, a
    list of them, encoded bytes, or a path relative to the data file."""

    prompt: Text = "prompt"
    answer: Text = "answer"
    image: Text | None = None
    level: Text | None = None
    chain: Text | None = None


class Source(Section):
    """One source of tasks: a generator (`name`, `package.module:Class`, `path/to/file.py:Class`) or a data set.

    dataset: a .parquet, .json, .jsonl or .csv file, a folder of pictures (with metadata.csv or .jsonl), or a hub id.
    weight: its share of the mix. levels: the levels that a generator draws. reward: one of `rewards.named`, a built-in,
    `package.module:attr` or `path/to/file.py:attr`; needed for a data set, while a generator brings its own verifier
    and uses `reward` only to override it.
    """

    generator: Text | None = None
    dataset: Text | None = None
    split: Text = "train"
    columns: Columns = Columns()
    reward: Text | None = None
    weight: PositiveFloat = 1.0
    levels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None


class Tasks(Section):
    """train: the mix for SFT and RL. evaluation: the mix for the held-out pictures; empty means the held-out part of
    the same sources."""

    train: tuple[Source, ...] = Field(min_length=1)
    evaluation: tuple[Source, ...] = ()


class Gate(Section):
    """RL starts only when the SFT model reads pictures well enough: the teacher-forced accuracy on the words of
    held-out chains that state what was seen (all words of the chain where a source does not mark them)."""

    min_accuracy: Fraction = 0.85
    tasks: PositiveInt = 96


class Phase(Section):
    """A stretch of SFT. styles: share of each chain style, of those that a task has."""

    steps: PositiveInt = 400
    styles: dict[str, PositiveFloat] = Field(default={"short": 1.0, "medium": 1.0, "verbose": 1.0}, min_length=1)


class SFT(Section):
    """Long-CoT SFT with TRL's SFTTrainer, loss on the response only.

    examples: different tasks to draw from. phases: one after another, under one learning-rate schedule. batch:
    sequences a step, over all ranks. learning_rate: peak, after `warmup_steps`, decaying by a cosine to
    `final_learning_rate_ratio` of itself.
    """

    examples: PositiveInt = 4000
    phases: tuple[Phase, ...] = Field(default=(Phase(),), min_length=1)
    batch: PositiveInt = 48
    ranks: PositiveInt = 1
    learning_rate: PositiveFloat = 3e-3
    warmup_steps: NonNegativeInt = 30
    final_learning_rate_ratio: Fraction = 0.1
    weight_decay: NonNegativeFloat = 0.01
    grad_clip: PositiveFloat = 1.0
    gate: Gate = Gate()

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)


class Length(Section):
    """The length reward of k1.5 (arXiv 2501.12599, section 2.3.3), added to the correctness reward with `weight`.

    start_iteration: no penalty before it ("warm-up" in the paper is a step). gate: only groups whose success rate is
    above it are penalised; null is the paper's own rule, which also tells all-wrong groups to be shorter.
    """

    weight: NonNegativeFloat = 1.0
    start_iteration: NonNegativeInt = 5
    gate: Fraction | None = 0.5


class RL(Section):
    """Online policy mirror descent (arXiv 2501.12599, section 2.3.2).

    prompts x samples responses an iteration, trained on in `minibatches` optimizer steps; tau is the weight of the
    squared log-ratio to the reference pi_i. normalisation: a constant that divides the loss of every sequence (1 = the
    paper's sum).
    """

    iterations: NonNegativeInt = 20
    pool: PositiveInt = 600
    prompts: PositiveInt = 32
    samples: PositiveInt = 8
    minibatches: PositiveInt = 4
    tau: NonNegativeFloat = 0.1
    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat = 1.0
    normalisation: PositiveFloat = 1.0
    optimizer_reset: bool = True
    temperature: PositiveFloat = 1.0
    max_tokens: PositiveInt = 128
    length: Length = Length()


class Sampling(Section):
    """Which prompts an iteration takes.

    curriculum: `linear` admits levels from the easiest up to all of them over the first `curriculum_iterations`.
    prioritised: probability proportional to 1 - s_i (s_i: running success rate), never below `floor`.
    prior_strength: how many imagined samples of the prompt's (source, level) bucket an unseen prompt starts with.
    decay: what a bucket's or prompt's old evidence is multiplied with when new evidence comes (the policy has moved).
    """

    curriculum: Literal["linear", "off"] = "linear"
    curriculum_iterations: PositiveInt = 10
    prioritised: bool = True
    prior_strength: PositiveFloat = 4.0
    floor: Fraction = 0.05
    decay: Fraction = 0.8


class Rollout(Section):
    """The vLLM engine. kv_cache_gib: memory for its KV cache on a CPU; gpu_memory: share of a GPU's memory it may take.
    max_model_len: longest prompt + response. ban: extra token ids that must not be sampled (image placeholders never
    are)."""

    max_sequences: PositiveInt = 256
    max_model_len: PositiveInt = 512
    kv_cache_gib: PositiveInt = 1
    gpu_memory: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    ban: tuple[NonNegativeInt, ...] = ()


class Learner(Section):
    """The DeepSpeed engine. row_tokens: how long a packed row may get. logp_chunk: tokens whose vocabulary is
    materialised at a time. bias_update: step of the sign update that keeps the experts' load even (0 = watch only)."""

    zero_stage: Annotated[int, Field(ge=1, le=3)] = 1
    row_tokens: PositiveInt = 1024
    logp_chunk: PositiveInt = 256
    bias_update: NonNegativeFloat = 1e-3
    port: Annotated[int, Field(ge=0, le=65535)] = 0


class Part(Section):
    """One reward of a composition. reward: a built-in, `package.module:attr`, `path/to/file.py:attr` or an entry point.
    weight: its share; only the ratios count. options: the reward's own (rewards/README.md has those of the built-in
    ones)."""

    reward: Text
    weight: PositiveFloat = 1.0
    options: dict[str, Any] = {}


class Named(Section):
    """A reward of this recipe, which a source names by `reward`: the weighted mean of its parts, or one reward with
    options. A part that fails makes the whole fail; `tool_bonus` is paid only when the rest is right.

    timeout_s, concurrency: null is what `rewards` says.
    """

    parts: tuple[Part, ...] = Field(min_length=1)
    timeout_s: PositiveFloat | None = None
    concurrency: PositiveInt | None = None


class Rewards(Section):
    """Scoring. timeout_s: per sample and attempt; math, code, judge and what is put together with them keep time
    themselves, and have this limit only where `named` gives it. concurrency: how many samples each reward scores at a
    time. retries: of a failure (never of a wrong answer), after waits that double. max_failures: the run stops when a
    larger share of an iteration's samples could not be scored. named: rewards put together here.

    While a run goes on, the file `rewards.yaml` in its folder, with lines like `judge: {timeout_s: 60, concurrency:
    16}`, overrides timeout_s and concurrency of the rewards that it names, as soon as it changes.
    """

    timeout_s: PositiveFloat = 10.0
    concurrency: PositiveInt = 64
    retries: NonNegativeInt = 1
    max_failures: Fraction = 0.5
    named: dict[str, Named] = {}


class Parity(Section):
    """The run stops when |engine log-prob - learner's pi_i log-prob| of a sampled token exceeds `max` (null = watch
    only)."""

    max: PositiveFloat | None = 1e-3


class Evaluation(Section):
    """Held-out tasks before and after RL: `tasks` x `samples` at T=1, and each task once greedily."""

    tasks: PositiveInt = 360
    samples: PositiveInt = 2


class Checkpoint(Section):
    """every: iterations between checkpoints (the last iteration always has one). keep: how many stay on disk."""

    every: PositiveInt = 5
    keep: PositiveInt = 2


class Report(Section):
    """trajectories: how many sampled responses report.html shows with their picture."""

    trajectories: PositiveInt = 12


class Recipe(Section):
    """A run. stages: `sft` and `rl`, in this order; rl alone needs a policy.model that has been fine-tuned already."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what NumPy takes
    output: Text = "runs"
    threads: PositiveInt = 1
    stages: tuple[Literal["sft", "rl"], ...] = Field(default=("sft", "rl"), min_length=1)
    policy: Policy = Policy()
    tasks: Tasks
    sft: SFT = SFT()
    rl: RL = RL()
    sampling: Sampling = Sampling()
    rollout: Rollout = Rollout()
    learner: Learner = Learner()
    rewards: Rewards = Rewards()
    parity: Parity = Parity()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    report: Report = Report()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        """What no single key can tell. Raises RecipeError (pydantic passes it on as it is) with all that is wrong."""
        checks = (
            _check_stages,
            _check_sources,
            _check_names,
            _check_held_out,
            _check_batches,
            _check_lengths,
            _check_tiny,
        )
        errors = [error for check in checks for error in check(self)]
        if errors:
            raise RecipeError.of(errors)
        return self


def _check_stages(recipe: Recipe) -> Iterator[RecipeError]:
    stages = recipe.stages
    if stages not in (("sft",), ("rl",), ("sft", "rl")):
        yield RecipeError("stages", stages, "each stage at most once, sft before rl", "give [sft, rl], [sft] or [rl]")
    elif stages == ("rl",) and recipe.policy.model == "tiny_kimi":
        yield RecipeError(
            "stages",
            stages,
            "policy.model = tiny_kimi starts untrained, and RL cannot teach it to read",
            "give stages=[sft,rl], or a policy.model that has been fine-tuned",
        )


def _sources(recipe: Recipe) -> Iterator[tuple[str, Source]]:
    for place, sources in (("train", recipe.tasks.train), ("evaluation", recipe.tasks.evaluation)):
        for index, source in enumerate(sources):
            yield f"tasks.{place}[{index}]", source


def _check_sources(recipe: Recipe) -> Iterator[RecipeError]:
    for key, source in _sources(recipe):
        if (source.generator is None) == (source.dataset is None):
            problem = f"has {'neither a generator nor' if source.generator is None else 'a generator and'} a dataset"
            yield RecipeError(key, ABSENT, problem, "give one of the two; two sources are two elements of the list")
        elif source.generator is not None:
            yield from _check_generator(key, source)
        else:
            yield from _check_dataset(key, source)


def _check_generator(key: str, source: Source) -> Iterator[RecipeError]:
    for name in ("split", "columns"):
        value = getattr(source, name)
        if value != Source.model_fields[name].default:
            shown = value.model_dump() if isinstance(value, Columns) else value
            yield RecipeError(f"{key}.{name}", shown, f"a generator has no {name}", "leave it out, or give a dataset")


def _check_dataset(key: str, source: Source) -> Iterator[RecipeError]:
    if source.reward is None:
        problem = f"missing: {source.dataset} brings no verifier"
        yield RecipeError(f"{key}.reward", ABSENT, problem, "name a reward, or give path/to/file.py:function")
    if source.levels is not None:
        mend = f"leave it out; {key}.columns.level names the column with the level"
        yield RecipeError(f"{key}.levels", source.levels, "levels are what a generator draws", mend)


def _check_names(recipe: Recipe) -> Iterator[RecipeError]:
    for name in recipe.rewards.named:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            mend = "give letters, digits, `_` and `-`, starting with a letter or a digit"
            yield RecipeError("rewards.named", name, "not a valid name", mend)


def _check_held_out(recipe: Recipe) -> Iterator[RecipeError]:
    sources = len(recipe.tasks.evaluation or recipe.tasks.train)
    if recipe.evaluation.tasks < sources:
        problem = f"too few for {sources} sources of held-out tasks"
        yield RecipeError("evaluation.tasks", recipe.evaluation.tasks, problem, f"give at least {sources}")


def _check_batches(recipe: Recipe) -> Iterator[RecipeError]:
    rl, sft = recipe.rl, recipe.sft
    if rl.prompts % rl.minibatches:
        yield _does_not_divide("rl.minibatches", rl.minibatches, "rl.prompts", rl.prompts)
    if sft.batch % sft.ranks:
        yield _does_not_divide("sft.ranks", sft.ranks, "sft.batch", sft.batch)
    if rl.pool < rl.prompts:
        mend = f"give at least {rl.prompts}, or rl.prompts={rl.pool}"
        yield RecipeError("rl.pool", rl.pool, f"smaller than rl.prompts = {rl.prompts}", mend)
    if "rl" in recipe.stages and rl.samples == 1:
        problem = "one response is its own mean, so its advantage is always 0"
        yield RecipeError("rl.samples", rl.samples, problem, "give at least 2")


def _does_not_divide(key: str, parts: int, whole_key: str, whole: int) -> RecipeError:
    below, above = whole // parts * parts, (whole // parts + 1) * parts
    divisors = [n for n in range(1, whole + 1) if whole % n == 0]
    near = sorted(sorted(divisors, key=lambda n: abs(n - parts))[:2])
    wholes = " or ".join(str(n) for n in (below, above) if n)
    mend = f"give {' or '.join(map(str, near))}, or {whole_key}={wholes}"
    return RecipeError(key, parts, f"does not divide {whole_key} = {whole}", mend)


def _check_lengths(recipe: Recipe) -> Iterator[RecipeError]:
    response, longest = recipe.rl.max_tokens, recipe.rollout.max_model_len
    if response >= longest:
        problem = f"leaves no room for the prompt in rollout.max_model_len = {longest}"
        yield RecipeError("rl.max_tokens", response, problem, "give fewer, or a larger rollout.max_model_len")


def _check_tiny(recipe: Recipe) -> Iterator[RecipeError]:
    tiny, longest = recipe.policy.tiny, recipe.rollout.max_model_len
    if recipe.policy.model != "tiny_kimi":
        if tiny != TinyPolicy():
            key, problem = "policy.tiny", f"describes tiny_kimi, but policy.model is {recipe.policy.model}"
            yield RecipeError(key, ABSENT, problem, "leave it out, or give policy.model=tiny_kimi")
        return
    if tiny.experts_per_token > tiny.experts:
        problem = f"more than policy.tiny.experts = {tiny.experts}"
        mend = f"give at most {tiny.experts}"
        yield RecipeError("policy.tiny.experts_per_token", tiny.experts_per_token, problem, mend)
    if tiny.vision_hidden % _VISION_MULTIPLE:
        problem = f"not a multiple of {_VISION_MULTIPLE} (4 heads with rotary positions in 2 dimensions)"
        near = max(_VISION_MULTIPLE, round(tiny.vision_hidden / _VISION_MULTIPLE) * _VISION_MULTIPLE)
        yield RecipeError("policy.tiny.vision_hidden", tiny.vision_hidden, problem, f"give for example {near}")
    if longest > _TINY_POSITIONS:
        problem = "more positions than tiny_kimi has"
        yield RecipeError("rollout.max_model_len", longest, problem, f"give at most {_TINY_POSITIONS}")
