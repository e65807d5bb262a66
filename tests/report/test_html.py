from __future__ import annotations

import base64
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from rlvlm.report.html import NotARunFolderError, write_report
from rlvlm.report.metrics import MetricsLog
from rlvlm.report.showcase import choose
from rlvlm.report.trajectories import evaluation_file, iteration_file, read_trajectories

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags, attributes and words of a page; `unclosed` is what a browser would have to guess."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.unclosed: list[str] = []
        self.mismatched: list[tuple[str, str]] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        last = self.unclosed.pop()
        if last != tag:
            self.mismatched.append((last, tag))

    def handle_data(self, data: str) -> None:
        if not self.unclosed or self.unclosed[-1] not in ("style", "script"):
            self.words.append(data)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]


def report_of(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def copy(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "tiny_demo"))


def test_the_page_needs_nothing_else_and_is_well_formed(copy: Path) -> None:
    text, page = report_of(copy)
    assert page.mismatched == [] and page.unclosed == []
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links and all(link is not None and link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"https?://|@import|url\(", text)
    assert str(copy) not in text


def test_the_headline_is_the_summary(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    first, second = (summary["evaluation"][stage] for stage in ("sft", "rl"))
    _, page = report_of(copy)
    headline = f"{100 * first['accuracy']:.1f}% → {100 * second['accuracy']:.1f}%"
    assert headline in page.text
    assert f"+{summary['accuracy_gain']['points']:.1f} points" in page.text
    assert "4 min 47 s" in page.text and "5.3 GB" in page.text and "622,752" in page.text
    assert "come from choosing other chain styles" in page.text
    assert "not finished" not in page.text


def test_the_table_has_tasks_levels_and_styles(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    first, second = (summary["evaluation"][stage] for stage in ("sft", "rl"))
    _, page = report_of(copy)
    for kind, name, label in (("by_task", "digit_sum", "digit_sum"), ("by_level", "5", "level 5")):
        before, after = (100 * side[kind][name]["accuracy"] for side in (first, second))
        change = f"{after - before:+.1f}".replace("-", "−")
        assert f"{label} {before:.1f}% {after:.1f}% {change}" in page.text
    style = first["by_style"]["short"]
    assert f"{100 * style['accuracy']:.1f}% n = {style['samples']}" in page.text


def test_every_curve_that_was_asked_for_carries_the_run_s_numbers(copy: Path) -> None:
    _, page = report_of(copy)
    charts = {a["aria-label"].split(":")[0]: json.loads(a["data-chart"]) for a in page.of_class("chart")}  # type: ignore[union-attr,arg-type]
    wanted = {
        "Reward": "reward", "Accuracy": "accuracy", "Chain length": "completions/mean_length", "KL": "kl",
        "Entropy": "entropy", "Parity": "parity/max", "Expert load, entropy": "load/entropy",
        "Expert load, max/mean": "load/max_mean", "Gradient norm": "grad_norm", "Parts of the reward": "reward/format",
        "Success rate": "success_rate/digit_sum",
    }  # fmt: skip
    records = MetricsLog(copy / "metrics.jsonl").read()
    for title, key in wanted.items():
        expected = [[r["iteration"], r[key]] for r in records if r["stage"] == "rl"]
        assert [point[:2] for point in charts[title]["lines"][0]["points"]] == expected, title
    assert [line["name"] for line in charts["Parts of the reward"]["lines"]] == ["format", "number"]
    losses = [[r["step"], r["loss"]] for r in records if r["stage"] == "sft"]
    assert [point[:2] for point in charts["SFT loss"]["lines"][0]["points"]] == losses
    parity = charts["Parity"]["lines"][0]["points"]
    decade = 154 / 5  # pixels: five decades from 1e-8 to the limit at 1e-3
    climbed = decade * (math.log10(parity[1][1]) - math.log10(parity[0][1]))
    assert parity[0][3] - parity[1][3] == pytest.approx(climbed, abs=0.11)


def test_the_curve_on_held_out_pictures_has_its_intervals(copy: Path) -> None:
    log = MetricsLog(copy / "metrics.jsonl")
    for iteration, accuracy in ((0, 0.25), (2, 0.5)):
        ci95 = [accuracy - 0.125, accuracy + 0.125]
        log.write({"stage": "evaluation", "iteration": iteration, "accuracy": accuracy, "ci95": ci95})
    _, page = report_of(copy)
    charts = {a["aria-label"].split(":")[0]: json.loads(a["data-chart"]) for a in page.of_class("chart")}  # type: ignore[union-attr,arg-type]
    points = charts["Held-out accuracy"]["lines"][0]["points"]
    assert [point[:2] for point in points] == [[0, 0.25], [2, 0.5]]


def test_a_dozen_responses_with_picture_tokens_and_parts(copy: Path) -> None:
    _, page = report_of(copy)
    assert len(page.of_class("response")) == 12
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 12
    shown = choose(copy, 12)
    encoded = (pictures[0]["src"] or "").partition(",")[2]
    assert base64.b64decode(encoded) == (copy / "images" / f"{shown[0].sample.images[0]}.png").read_bytes()
    tokens = page.of_class("t")
    assert len(tokens) == sum(s.sample.length for s in shown)
    expected = [f"{p:.4f}" for s in shown for p in s.sample.engine_logp]
    assert [t["data-p"] for t in tokens] == expected
    versions = [span.weight_version for s in shown for span in s.sample.segments]
    assert [int(run["data-v"] or -1) for run in page.of_class("run")] == versions
    last = shown[-1].sample
    assert f"answered {shown[-1].given} reference {last.answer} exact" in page.text


def test_before_and_after_are_shown_on_the_same_tasks_and_iterations_from_first_to_last(copy: Path) -> None:
    shown = choose(copy, 12)
    assert [s.when for s in shown[:6]] == ["before RL", "after RL"] * 3
    assert [shown[i].sample.task_id for i in (0, 2, 4)] == [shown[i].sample.task_id for i in (1, 3, 5)]
    assert len({s.sample.source for s in shown[:6]}) == 2
    assert [s.sample.iteration for s in shown[6:]] == [1, 5, 9, 12, 16, 20]


def test_the_recipe_says_how_many_responses(copy: Path) -> None:
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["report"]["trajectories"] = 5
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, page = report_of(copy)
    assert len(page.of_class("response")) == 5


def test_what_a_policy_says_is_text_and_nothing_else(copy: Path) -> None:
    """Everything that comes from outside: tokens, the recipe, the run's name, versions."""
    evil = "<script>alert(1)</script>"
    for path in (copy / "trajectories").iterdir():
        table = pq.read_table(path).to_pylist()
        for row in table:
            row.update(prompt=evil, answer=evil, text=f"x</think>{evil}", tokens=[evil] * row["length"], source=evil)
            row.update(parts=json.dumps({evil: 1.0}), style=evil)
        pq.write_table(pa.Table.from_pylist(table, schema=pq.read_schema(path)), path)
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text() + f"# {evil}\n")
    summary = json.loads((copy / "summary.json").read_text())
    summary.update(name=evil, versions={evil: evil})
    for stage in ("sft", "rl"):
        summary["evaluation"][stage]["by_style"][evil] = {"share": 0.1, "accuracy": 0.5, "samples": 3}
        summary["evaluation"][stage]["by_task"][evil] = summary["evaluation"][stage]["by_task"]["digit_sum"]
    (copy / "summary.json").write_text(json.dumps(summary))
    _, page = report_of(copy)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.mismatched == []
    assert page.text.count(evil) > 100


def test_an_unfinished_run_says_so(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=7, finished=False, held_out=8)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"stage": "rl", "iter')  # it is being written right now
    _, page = report_of(folder)
    assert "not finished" in page.text and "7 of 20 RL iterations" in page.text
    assert "Before and after" not in page.text
    accuracy = [r["accuracy"] for r in MetricsLog(folder / "metrics.jsonl").read() if r["stage"] == "rl"]
    assert f"{100 * accuracy[0]:.1f}% → {100 * accuracy[-1]:.1f}%" in page.text
    assert len(page.of_class("response")) == 12
    rollout = sum(r["seconds/rollout"] for r in MetricsLog(folder / "metrics.jsonl").read() if r["stage"] == "rl")
    assert f"rollout {rollout:.0f} s" in page.text and "sft 1 min 56 s" in page.text
    assert page.mismatched == []


def test_an_interrupted_sft_counts_its_steps_and_seconds(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=0, finished=False, held_out=8)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:20]))
    _, page = report_of(folder)
    assert "200 of 400 SFT steps" in page.text
    assert "sft 58 s (100.0%)" in page.text  # 200 steps of 0.29 s


@pytest.mark.parametrize("stages", [["sft"], ["rl"]])
def test_a_run_of_one_stage(copy: Path, stages: list[str]) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    kept = stages[0]
    summary["evaluation"] = {kept: summary["evaluation"][kept]}
    for key in ("accuracy_gain", "length_change", "parity"):
        del summary[key]
    (copy / "summary.json").write_text(json.dumps(summary))
    evaluation_file(copy, {"sft": "rl", "rl": "sft"}[kept]).unlink()
    _, page = report_of(copy)
    assert f"{100 * summary['evaluation'][kept]['accuracy']:.1f}%" in page.text
    assert "come from choosing" not in page.text
    assert page.mismatched == []


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: fresh\n")
    _, page = report_of(tmp_path)
    assert "fresh" in page.text and "nothing measured yet" in page.text


def test_a_picture_that_is_gone_is_said_to_be(copy: Path) -> None:
    shutil.rmtree(copy / "images")
    _, page = report_of(copy)
    assert page.text.count("picture not in the run folder") == 12


def test_a_photograph_is_scaled_down(copy: Path) -> None:
    key = choose(copy, 12)[0].sample.images[0]
    Image.effect_noise((2000, 1000), 80).save(copy / "images" / f"{key}.png")
    picture = choose(copy, 12)[0].pictures[0]
    assert picture is not None and not picture.pixelated
    assert len(picture.url) < 640 * 320 * 1.5
    assert "pixelated" in report_of(copy)[0]


def test_a_failed_reward_is_unscored_and_never_a_zero(copy: Path) -> None:
    everything = [s for path in (copy / "trajectories").iterdir() for s in read_trajectories(path)]
    assert any(s.failure == "timeout" and s.value is None for s in everything)
    path = iteration_file(copy, 1)
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row.update(value=None, failure="timeout", reward=None, advantage=None, parts="{}")
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)
    _, page = report_of(copy)
    assert "unscored: timeout" in page.text


def test_a_long_chain_is_cut_and_says_so(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvlm.report.showcase.MOST_TOKENS", 5)
    _, page = report_of(copy)
    assert len(page.of_class("t")) == 12 * 5
    assert f"… {choose(copy, 12)[0].sample.length - 5} more tokens" in page.text


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(NotARunFolderError, match=r"has no recipe\.yaml"):
        write_report(tmp_path)
