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


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685) train in place of the weights, in every group whose learning rate is not 0.

    targets: the linear layers that get one: `attention`, `all-linear` (the output layer is none of them), names as in
    [q_proj, v_proj], regular expressions over whole names. experts: the experts of a mixture too. dropout: of what an
    adapter reads, in SFT; RL has none.
    """

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: tuple[Text, ...] = Field(default=("attention",), min_length=1)
    experts: bool = False


class LearningRates(Section):
    """A learning rate for a part of the model; 0 freezes it, and a part without one has the stage's `learning_rate`.

    vision: the tower that sees pictures. projector: what brings its output to the language model. router: what chooses
    a mixture's experts. language: all the rest.
    """

    vision: NonNegativeFloat | None = None
    projector: NonNegativeFloat | None = None
    language: NonNegativeFloat | None = None
    router: NonNegativeFloat | None = None


class Policy(Section):
    """model: `tiny_kimi` (built from `tiny`), a directory with a checkpoint, or a hub id. lora: adapters in place of
    full training; absent = none."""

    model: Text = "tiny_kimi"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: Lora | None = None
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
    learning_rates: LearningRates = LearningRates()
    warmup_steps: NonNegativeInt = 30
    final_learning_rate_ratio: Fraction = 0.1
    weight_decay: NonNegativeFloat = 0.01
    grad_clip: PositiveFloat = 1.0
    gate: Gate = Gate()

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)


# What each objective is made of, as its paper gives it. A recipe names one as `preset` and overrides single keys.
PRESETS: dict[str, dict[str, Any]] = {
    "opmd": {},  # the defaults of Objective
    "grpo": {
        "level": "token",
        "surrogate": "ratio",
        "clip": {"kind": "ppo", "epsilon_low": 0.2, "epsilon_high": 0.2},
        "scale": "std",
        "tau": 0.0,
        "normalisation": "length",
        "optimizer_reset": False,
    },
    "gspo": {
        "surrogate": "ratio",
        "clip": {"kind": "ppo", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        "scale": "std",
        "tau": 0.0,
        "optimizer_reset": False,
    },
    "rloo": {"baseline": "leave_one_out", "tau": 0.0, "optimizer_reset": False},
    "rest": {"baseline": "none", "positives_only": True, "tau": 0.0},
}
# What a kind of clip or correction comes with where the recipe does not say.
_OF_KIND: dict[str, dict[str, dict[str, float]]] = {
    "clip": {"ppo": {"epsilon_low": 0.2, "epsilon_high": 0.2}},
    "correction": {"tis": {"cap": 2.0}, "icepop": {"low": 0.5, "high": 5.0}},
}


class Clip(Section):
    """How far a ratio pi / pi_i may go from 1, at the objective's level. kind: `ppo` takes the smaller of A ratio and A
    clip(ratio, 1 - epsilon_low, 1 + epsilon_high), so that only steps in the advantage's direction are bounded; `mask`
    leaves out what is outside, whatever the advantage's sign (K2.5; its alpha and beta are ln(1 - epsilon_low) and
    ln(1 + epsilon_high)); `none` bounds nothing."""

    kind: Literal["none", "ppo", "mask"] = "none"
    epsilon_low: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    epsilon_high: PositiveFloat | None = None


class Correction(Section):
    """What is done about engine and learner disagreeing on the log-prob of a sampled token, with w = pi_i / engine:
    `tis` weighs the token's gradient with min(w, cap); `icepop` weighs it with w within [low, high], and rejects the
    token elsewhere: it is out of the loss and of its denominators."""

    kind: Literal["none", "tis", "icepop"] = "none"
    cap: PositiveFloat | None = None
    low: NonNegativeFloat | None = None
    high: PositiveFloat | None = None


class Objective(Section):
    """What the learner minimises; `rlvlm/learner/objective.py` has the formulas. preset: fills every key that is not
    given: opmd (Kimi k1.5), grpo, gspo, rloo, rest.

    level: log-probs, ratios and tau's term are those of whole responses, or of tokens. surrogate: -A log pi, or -A
    ratio. baseline: what is taken off the rewards of a group (logmeanexp: tau log mean exp(r/tau)). scale: std divides
    by the group's standard deviation. positives_only: negative advantages count as 0. tau: weight of the squared
    log-ratio to the reference pi_i. normalisation: what a response's loss is divided by: nothing, its own length in
    tokens, a fixed `divisor`; `tokens` instead takes the mean over all tokens of the minibatch. optimizer_reset: the
    optimizer starts anew with every iteration's reference.
    """

    preset: Literal["opmd", "grpo", "gspo", "rloo", "rest"] = "opmd"
    level: Literal["sequence", "token"] = "sequence"
    surrogate: Literal["log_prob", "ratio"] = "log_prob"
    clip: Clip = Clip()
    baseline: Literal["mean", "leave_one_out", "logmeanexp", "none"] = "mean"
    scale: Literal["none", "std"] = "none"
    positives_only: bool = False
    tau: NonNegativeFloat = 0.1
    normalisation: Literal["none", "length", "fixed", "tokens"] = "none"
    divisor: PositiveFloat | None = None
    correction: Correction = Correction()
    optimizer_reset: bool = True

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Lays what is given over the preset. What is no section, or no preset, is left for pydantic to refuse."""
        preset = data.get("preset", "opmd") if isinstance(data, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return data
        filled = {**PRESETS[preset], **data}
        for key, kinds in _OF_KIND.items():
            given = data.get(key, {})
            if isinstance(given, dict):
                whole = PRESETS[preset].get(key, {})
                kind = given.get("kind", whole.get("kind", "none"))
                usual = whole if kind == whole.get("kind") else kinds.get(str(kind), {})
                filled[key] = usual | {
                    name: value for name, value in given.items() if value is not None or name == "kind"
                }
        return filled


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

    prompts x samples responses an iteration, trained on in `minibatches` optimizer steps. router_replay: which experts
    a mixture's tokens go to in the learner: `r2` those that pi_i chose, `r3` those that the rollout engine chose.
    """

    iterations: NonNegativeInt = 20
    pool: PositiveInt = 600
    prompts: PositiveInt = 32
    samples: PositiveInt = 8
    minibatches: PositiveInt = 4
    learning_rate: PositiveFloat = 1e-4
    learning_rates: LearningRates = LearningRates()
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat = 1.0
    temperature: PositiveFloat = 1.0
    max_tokens: PositiveInt = 128
    router_replay: Literal["none", "r2", "r3"] = "none"
    objective: Objective = Objective()
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


class Balance(Section):
    """The load of a mixture's experts. kind: `bias` moves the routers' selection bias by `step` after every optimizer
    step, against the experts' load; `auxiliary` adds a loss with `coefficient`; `auto` takes what the model's family
    was made for; `off` only watches. collapse: a layer is told to have collapsed when its tokens use, beyond the
    experts of a single token, less than this share of the others (0 = never).
    """

    kind: Literal["auto", "bias", "auxiliary", "off"] = "auto"
    step: PositiveFloat = 1e-3
    coefficient: PositiveFloat = 1e-3
    collapse: Fraction = 0.1


class Learner(Section):
    """The DeepSpeed engine. ranks: processes that learn together; several need Ray. zero_stage: what they share out:
    1 the optimizer's state, 2 gradients too, 3 weights too. expert_parallel (experimental): so many ranks share the
    experts of a mixture out, and tokens travel to them. offload: the optimizer's state lies in the CPU's memory.
    gradient_checkpointing: backward computes each layer again in place of keeping it. row_tokens: how long a packed row
    may get. logp_chunk: tokens whose vocabulary is materialised at a time. max_refused: the run stops when so many
    steps in a row had a loss or a gradient that is not finite (each is refused, and written down for `rlvlm
    replay-batch`). ray_address: the Ray cluster to join; null is the one that RAY_ADDRESS names, or one started for
    the run. limit_s: how long the ranks may take over a step or their start. port: where they meet; 0 is any."""

    ranks: PositiveInt = 1
    zero_stage: Annotated[int, Field(ge=1, le=3)] = 1
    expert_parallel: PositiveInt = 1
    offload: Literal["none", "optimizer"] = "none"
    gradient_checkpointing: bool = False
    row_tokens: PositiveInt = 1024
    logp_chunk: PositiveInt = 256
    max_refused: PositiveInt = 3
    balance: Balance = Balance()
    ray_address: Text | None = None
    limit_s: PositiveFloat = 3600.0
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
    """Held-out tasks before and after RL: `tasks` x `samples` at T=1, and each task once greedily. every: iterations
    between further evaluations at T=1 on the same tasks, while RL goes on (0 = none)."""

    every: NonNegativeInt = 0
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
            _check_objective,
            _check_bounds,
            _check_lengths,
            _check_lora,
            _check_experts,
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
    if "rl" in recipe.stages and rl.samples == 1 and rl.objective.baseline != "none":
        problem = "one response is its own mean, so its advantage is always 0"
        yield RecipeError("rl.samples", rl.samples, problem, "give at least 2")


def _does_not_divide(key: str, parts: int, whole_key: str, whole: int) -> RecipeError:
    below, above = whole // parts * parts, (whole // parts + 1) * parts
    divisors = [n for n in range(1, whole + 1) if whole % n == 0]
    near = sorted(sorted(divisors, key=lambda n: abs(n - parts))[:2])
    wholes = " or ".join(str(n) for n in (below, above) if n)
    mend = f"give {' or '.join(map(str, near))}, or {whole_key}={wholes}"
    return RecipeError(key, parts, f"does not divide {whole_key} = {whole}", mend)


def _check_objective(recipe: Recipe) -> Iterator[RecipeError]:
    """Combinations that mean nothing."""
    objective, here = recipe.rl.objective, "rl.objective"
    if objective.surrogate == "log_prob" and objective.clip.kind == "ppo":
        problem = f"{here}.surrogate = log_prob has no ratio to clip"
        yield RecipeError(f"{here}.clip.kind", "ppo", problem, "give mask or none, or surrogate=ratio")
    if objective.baseline == "logmeanexp" and objective.tau == 0.0:
        problem = f"tau log mean exp(r/tau) needs a tau, and {here}.tau = 0"
        yield RecipeError(f"{here}.baseline", "logmeanexp", problem, f"give {here}.tau=0.1, or baseline=mean")
    if objective.baseline == "none" and objective.scale == "std":
        problem = "the standard deviation is about a mean that is not taken off"
        yield RecipeError(f"{here}.scale", "std", problem, "give none, or baseline=mean")
    if objective.normalisation == "fixed" and objective.divisor is None:
        problem = f"missing: {here}.normalisation = fixed divides by it"
        mend = "give the usual length of a response in tokens, or 1 for the plain sum"
        yield RecipeError(f"{here}.divisor", ABSENT, problem, mend)
    if objective.normalisation != "fixed" and objective.divisor is not None:
        problem = f"not read with {here}.normalisation = {objective.normalisation}"
        yield RecipeError(f"{here}.divisor", objective.divisor, problem, "leave it out, or give normalisation=fixed")


# kind -> the keys that it reads
_BOUNDS: dict[str, dict[str, tuple[str, ...]]] = {
    "clip": {"none": (), "ppo": ("epsilon_low", "epsilon_high"), "mask": ("epsilon_low", "epsilon_high")},
    "correction": {"none": (), "tis": ("cap",), "icepop": ("low", "high")},
}


def _check_bounds(recipe: Recipe) -> Iterator[RecipeError]:
    """clip and correction have the bounds of their kind, and no others."""
    for name, kinds in _BOUNDS.items():
        section = getattr(recipe.rl.objective, name)
        key, kind = f"rl.objective.{name}", section.kind
        for bound in (field for field in type(section).model_fields if field != "kind"):
            value = getattr(section, bound)
            if bound in kinds[kind] and value is None:
                yield RecipeError(f"{key}.{bound}", ABSENT, f"missing: {key}.kind = {kind} needs it", "give a number")
            elif bound not in kinds[kind] and value is not None:
                kind_of = next(other for other, bounds in kinds.items() if bound in bounds)
                mend = f"leave it out, or give {key}.kind={kind_of}"
                yield RecipeError(f"{key}.{bound}", value, f"not read with {key}.kind = {kind}", mend)
    band = recipe.rl.objective.correction
    for name, bound, wrong in (
        ("low", band.low, (band.low or 0.0) >= 1.0),
        ("high", band.high, (band.high or 2.0) <= 1.0),
    ):
        if wrong:
            problem = "rejects tokens that engine and learner agree on, whose ratio is 1"
            mend = f"give a number {'below' if name == 'low' else 'above'} 1"
            yield RecipeError(f"rl.objective.correction.{name}", bound, problem, mend)


def _check_lengths(recipe: Recipe) -> Iterator[RecipeError]:
    response, longest = recipe.rl.max_tokens, recipe.rollout.max_model_len
    if response >= longest:
        problem = f"leaves no room for the prompt in rollout.max_model_len = {longest}"
        yield RecipeError("rl.max_tokens", response, problem, "give fewer, or a larger rollout.max_model_len")


def _check_experts(recipe: Recipe) -> Iterator[RecipeError]:
    """What experts that are shared out do not go together with: DeepSpeed puts blocks of its own in their place."""
    shared, key = recipe.learner.expert_parallel, "learner.expert_parallel"
    if shared == 1:
        return
    if recipe.learner.ranks % shared:
        problem = f"does not divide learner.ranks = {recipe.learner.ranks}"
        yield RecipeError(key, shared, problem, f"give a divisor of {recipe.learner.ranks}")
    against = {
        "learner.zero_stage": (recipe.learner.zero_stage, recipe.learner.zero_stage != 3, "1 or 2"),
        "learner.offload": (recipe.learner.offload, recipe.learner.offload == "none", "none"),
        "learner.balance.kind": (recipe.learner.balance.kind, recipe.learner.balance.kind == "off", "off"),
        "rl.router_replay": (recipe.rl.router_replay, recipe.rl.router_replay == "none", "none"),
    }
    for other, (value, fits, mend) in against.items():
        if not fits:
            yield RecipeError(key, shared, f"does not work with {other} = {value}", f"give {other}={mend}, or {key}=1")
    if recipe.policy.lora is not None:
        yield RecipeError(key, shared, "does not work with policy.lora", f"leave policy.lora out, or give {key}=1")


def _check_lora(recipe: Recipe) -> Iterator[RecipeError]:
    lora = recipe.policy.lora
    if lora is None:
        return
    for number, target in enumerate(lora.targets):
        try:
            re.compile(target)
        except re.error as error:
            problem = f"not a regular expression: {error}"
            yield RecipeError(f"policy.lora.targets[{number}]", target, problem, "give attention, all-linear or a name")
    if lora.experts and lora.dropout > 0.0:
        problem = "adapters of experts change the weights themselves and read nothing that could be dropped"
        yield RecipeError("policy.lora.dropout", lora.dropout, problem, "give 0, or policy.lora.experts=false")


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
