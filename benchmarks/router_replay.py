"""How far the rollout engine's experts and log-probs are from the learner's, and what replaying the engine's routing
(rl.router_replay r3) leaves of that. The policy is a tiny kimi_k25 with large random weights, in both dtypes.

    .venv/bin/python benchmarks/router_replay.py [--dtypes float32 bfloat16] [--layers 6] [--experts 16] [--quick]

Both passes of a dtype are over the same responses. experts: token-layers whose set of experts differs, as the learner
chooses freely, and as it would choose with the layers below replayed. tokens: those that differ in one layer at least.
gap: |engine log-prob - learner's| of the sampled tokens, in nats. KL: of the learner from the engine, by the estimator
exp(d) - 1 - d of d = learner's - engine's log-prob.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.learner.objective import Rewarded
from rlvlm.learner.packing import pack
from rlvlm.learner.replay import FREE, RouterReplay
from rlvlm.policy.checkpoint import load_policy, save_policy
from rlvlm.policy.initial import _texts
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.policy.tiny import build_tiny_kimi
from rlvlm.recipe.load import load_recipe
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Group, Row
from rlvlm.rollout.engine import RolloutEngine, Sampling
from rlvlm.tasks.pools import TaskPools

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny_demo.yaml"
SPREAD = 0.15  # standard deviation of every matrix: routers of an untrained policy are indifferent, these are not


def recipe_of(dtype: str, layers: int, experts: int, tasks: int) -> Recipe:
    tiny = [f"policy.tiny.layers={layers}", f"policy.tiny.experts={experts}"]
    rest = ["rl.router_replay=r3", "rl.minibatches=1", "sft.examples=40", f"evaluation.tasks={tasks}"]
    return load_recipe(RECIPE, [f"policy.dtype={dtype}", *tiny, *rest])


async def rollouts(
    recipe: Recipe, folder: Path, samples: int, tokens: int
) -> tuple[RowLogProbs, PromptEncoder, list[Group]]:
    """The policy as the learner sees it, and what the engine samples from it."""
    pools = TaskPools(recipe, folder / "images")
    model, processor = build_tiny_kimi(recipe.policy.tiny, _texts(pools.sft()), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SPREAD / parameter.std())
    save_policy(model, processor, folder / "hf")
    model, processor = load_policy(str(folder / "hf"), recipe.policy.dtype)
    encoder = PromptEncoder(processor, pools.store, model.config)
    banned = encoder.family.placeholder_ids(model.config)
    async with RolloutEngine(recipe, folder / "hf", encoder, banned) as engine:
        groups = await engine.generate(pools.evaluation(), Sampling(samples, 1.0, tokens, "benchmark", routing=True))
    return RowLogProbs(model.eval(), 1.0, banned, recipe.learner.logp_chunk), encoder, groups


@torch.no_grad()
def compare(module: RowLogProbs, replay: RouterReplay, rows: Sequence[Row], forced: bool) -> dict[str, float]:
    """Engine against learner, with the learner's routers free or forced."""
    gaps, token_layers, tokens = [], [0.0, 0.0], [0.0, 0.0]
    for row in rows:
        assert row.routing_TLK is not None
        with replay.record(), replay.replay(row.routing_TLK if forced else None):
            logp_N, _ = module(row)
        chosen_TLK = replay.pop_recorded()
        assert chosen_TLK is not None
        given_T = row.routing_TLK[:, 0, 0] != FREE
        differs_TL = (chosen_TLK.sort(-1).values != row.routing_TLK.sort(-1).values).any(-1)[given_T]
        token_layers = [token_layers[0] + int(differs_TL.sum()), token_layers[1] + differs_TL.numel()]
        tokens = [tokens[0] + int(differs_TL.any(-1).sum()), tokens[1] + len(differs_TL)]
        gaps.append(logp_N - row.engine_logp_T[row.trained_T])
    gap_N = torch.cat(gaps)
    differing, compared = replay.pop_mismatch().tolist()
    return {
        "experts": differing / compared if forced else token_layers[0] / token_layers[1],
        "tokens": float("nan") if forced else tokens[0] / tokens[1],
        "gap max": float(gap_N.abs().max()),
        "gap mean": float(gap_N.abs().mean()),
        "KL": float((gap_N.exp() - 1 - gap_N).mean()),
        "sampled": gap_N.numel(),
    }


def measure(recipe: Recipe, samples: int, tokens: int) -> dict[str, dict[str, float]]:
    """`free` and `r3` -> figures."""
    with tempfile.TemporaryDirectory() as folder:
        module, encoder, groups = asyncio.run(rollouts(recipe, Path(folder), samples, tokens))
        nothing = [Rewarded(g, (0.0,) * len(g.trajectories), (0.0,) * len(g.trajectories)) for g in groups]
        (minibatch,) = pack(nothing, encoder, recipe, seed=0).minibatches
        replay = RouterReplay(module.policy, encoder.family, "r3")
        rows = minibatch.rows[0]
        return {"free": compare(module, replay, rows, False), "r3": compare(module, replay, rows, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="few responses: a smoke test")
    arguments = parser.parse_args()
    tasks, samples, tokens = (12, 2, 16) if arguments.quick else (32, 8, 64)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU, {arguments.layers} layers, top-2 of {arguments.experts} experts")
    print("| dtype | routers | experts | tokens | gap max | gap mean | KL | sampled tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in arguments.dtypes:
        found = measure(recipe_of(dtype, arguments.layers, arguments.experts, tasks), samples, tokens)
        for routers, f in found.items():
            experts, differing = f"{f['experts']:.2%}", "" if routers == "r3" else f"{f['tokens']:.1%}"
            gaps = f"{f['gap max']:.2g} | {f['gap mean']:.2g} | {f['KL']:.2g}"
            print(f"| {dtype} | {routers} | {experts} | {differing} | {gaps} | {f['sampled']} |", flush=True)


if __name__ == "__main__":
    main()
