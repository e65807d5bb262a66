"""The main job for real: the demo recipe with a fixed seed improves, and writes what the documentation says."""

import json

import pytest
import yaml
from safetensors import safe_open

from rlvlm.report.metrics import MetricsLog

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def summary(demo):
    return json.loads((demo / "summary.json").read_text())


@pytest.fixture(scope="module")
def iterations(demo):
    return [line for line in MetricsLog(demo / "metrics.jsonl").read() if line["stage"] == "rl"]


def test_accuracy_rises_and_chains_get_shorter(summary):
    assert summary["evaluation"]["sft"]["samples"] >= 720 and summary["evaluation"]["rl"]["samples"] >= 720
    assert summary["accuracy_gain"]["points"] >= 8
    assert summary["accuracy_gain"]["ci95"][0] > 0
    assert summary["length_change"] <= -0.1


def test_engine_and_learner_agree_in_every_iteration(summary, iterations):
    assert all(0 < line["parity/max"] <= 1e-3 for line in iterations)
    assert summary["parity"]["max"] == max(line["parity/max"] for line in iterations)
    assert summary["parity"]["tokens"] == sum(line["tokens"] for line in iterations)


def test_the_loop_costs_little_beside_its_parts(iterations):
    total = sum(line["seconds/iteration"] for line in iterations)
    assert sum(line["seconds/other"] for line in iterations) <= 0.05 * total


def test_memory_and_experts(summary, iterations):
    assert summary["peak_rss_bytes"] < 8 * 2**30
    assert min(line["load/entropy"] for line in iterations) > 0.8


def test_summary_has_every_promised_key(summary):
    assert set(summary) == {
        "name", "seed", "wall_s", "peak_rss_bytes", "policy", "versions", "zero_stage", "evaluation", "accuracy_gain",
        "length_change", "parity", "seconds",
    }  # fmt: skip
    assert summary["policy"]["architecture"] == "kimi_k25"
    assert set(summary["seconds"]) == {"sft", "rollout", "reward", "learner", "transfer", "evaluation", "other"}
    assert summary["wall_s"] == pytest.approx(sum(summary["seconds"].values()))
    for side in summary["evaluation"].values():
        rates = {"accuracy", "ci95", "samples", "greedy_accuracy", "mean_length", "by_task", "by_level", "by_style"}
        assert rates <= set(side)


def test_curriculum_starts_easy_and_the_length_reward_waits(demo, iterations):
    recipe = yaml.safe_load((demo / "recipe.yaml").read_text())
    start = recipe["rl"]["length"]["start_iteration"]
    assert iterations[0]["mean_level"] < iterations[-1]["mean_level"]
    assert all(line["length_reward"] == 0 for line in iterations if line["iteration"] < start)
    assert any(line["length_reward"] > 0 for line in iterations)


def test_the_last_checkpoint_is_plain_and_published_names_are_used(demo, iterations):
    hf = demo / "checkpoints" / f"step-{len(iterations)}" / "hf"
    with safe_open(hf / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert any(name.startswith("language_model.model.layers.1.mlp.experts.0.") for name in names)
    assert not any("blocks.1.mlp.experts" in name for name in names)


def test_no_image_placeholder_was_sampled(demo):
    import pyarrow.parquet as pq

    files = sorted((demo / "trajectories").glob("*.parquet"))
    assert len(files) >= 4
    for file in files:
        for tokens in pq.read_table(file, columns=["tokens"]).column("tokens").to_pylist():
            assert not any(token.startswith("<|media") or "video" in token for token in tokens)


def test_report_is_one_self_contained_file(demo):
    html = (demo / "report.html").read_text()
    assert "data:image/png;base64," in html and 'src="http' not in html and 'href="http' not in html
    assert html.count("data:image/png;base64,") >= 6


def test_the_terminal_tells_the_story(demo):
    text = (demo / "terminal.txt").read_text()
    for part in ("iteration  1/", "reward", "tok/s", "left", "before RL", "after RL", "report.html", "gate: reads"):
        assert part in text
