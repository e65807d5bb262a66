"""The reward `math`: what is right and what is not, cheats, bombs, and processes that die."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvlm_rewards import Failure, Sample, Score, load_reward
from rlvlm_rewards.math import Math, pool, worker
from rlvlm_rewards.math.frames import receive, send

MATH = Math()
BOMB = r"9^{9^{9^{9}}}"
SLOW_TO_READ = "x^" * 900 + "1"
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is $3 + 4$?"}]}


def scored(completion: str, answer: str, math: Math = MATH, **fields: object) -> Score:
    """On an event loop of its own: the pool belongs to none."""
    return asyncio.run(math(Sample(completion, answer, task="row 7", **fields)))


def boxed(answer: str, reference: str) -> float | None:
    return scored(rf"so \boxed{{{answer}}}.", reference).value


@pytest.fixture(scope="module", autouse=True)
def _close() -> object:
    yield
    asyncio.run(MATH.aclose())


def test_the_specification_s_own_example() -> None:
    sample = Sample(completion="… \\boxed{1/2}", answer="0.5")
    assert asyncio.run(load_reward("math")(sample)) == Score(value=1.0)


@pytest.mark.parametrize(
    "case",
    [
        *("1/2|0.5", r"0.5|\frac12", "0.5|50%", r"50|50\%", "10,000|10^4", "10 000|10000", "-3|−3", "1024|2^{10}"),
        *(
            "2 1/2|2.5",
            "-2 1/2|-5/2",
            "1.5e3|1500",
            r"1.6e-19|1.6 \times 10^{-19}",
            "0.3333333|1/3",
            r"$\frac{1}{2}$|0.5",
        ),
        *(
            r"\boxed{7}|7",
            "3.5 cm|3.5",
            r"12 square meters|12 \text{ m}^2",
            r"90^\circ|90",
            r"\$5|5",
            "pi/2|\\frac{\\pi}{2}",
        ),
        *("x^2+1|1+x^2", "2*x**2|2x^2", r"2\sqrt{3}|\sqrt{12}", r"\sqrt{2}+1|\frac{1}{\sqrt{2}-1}", "3+4i|4i+3"),
        *("1,2,3|3, 1, 2", r"\{1,2\}|1 \text{ or } 2", "x=3 or x=4|x=4, x=3", r"\pm 2|2,-2", r"\emptyset|\varnothing"),
        *("(1,2)|(1, 2)", "[0,1)|[0, 1)", r"(-\infty,-1)\cup(1,\infty)|(-oo,-1) \cup (1,oo)", "(3,4,5)|(3, 4, 5)"),
        *(
            "x=3|3",
            "3|x=3",
            "2x+1=y|y=2x+1",
            r"1<x<2|x \in (1,2)",
            "C|(C)",
            r"(C)|\text{C}",
            r"No solution|\text{no solution}",
        ),
        r"\begin{pmatrix}1\\2\end{pmatrix}|\begin{bmatrix}1\\2\end{bmatrix}",
    ],
)
def test_right_in_another_form(case: str) -> None:
    reference, answer = case.split("|")
    assert boxed(answer, reference) == 1.0


@pytest.mark.parametrize(
    "case",
    [
        *("0.5|5", "50|0.5", "3|2", "x|y", "1|0.9999", "2|x", "x<2|x<3", "(1,2)|[1,2]", "3/2|2 1/2", "East|Seat", "7|"),
        # tiny numbers, which Math-Verify alone rounds to one another
        *("1e-7|0", "1.6e-19|0", "1.6e-19|10^{-19}"),
        # every option at once
        *(
            "2|1,2,3",
            "2|1 or 2 or 3",
            r"2|\text{1 or 2}",
            r"2|\pm 2",
            "7|3 \\quad 4",
            "6|1 2 3",
            "C|A, B, C, D",
            "C|A or B or C",
        ),
        "7|" + ",".join(map(str, range(100))),
        # what is not an answer
        *(
            r"5|\mathbb{R}",
            r"5|\infty",
            r"5|\text{nan}",
            "5|1/0",
            "5|0/0",
            r"5|\emptyset",
            "5|x=x",
            "x=3|x=x",
            "x=3|0=0",
        ),
        *("y=2x+1|x=x", "y=2x+1|0=1", "x^2=-1|0=1", r"1/3|\int_0^1 x^2 dx", r"55|\sum_{n=1}^{10} n", "5|True"),
        r"2|\lim_{x \to 1} 2x",
    ],
)
def test_wrong(case: str) -> None:
    reference, answer = case.split("|")
    assert boxed(answer, reference) == 0.0


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("The answer is 0.5.", 1.0),
        ("We find $x^2$, and the answer is $\\frac{1}{2}$", 1.0),
        ("1/2", 1.0),
        ("<think>0.5</think> The answer is: 3", 0.0),
        ("<think>it is \\boxed{0.5}", 0.0),  # never came to an answer
        ("\\boxed{0.5} or \\boxed{7}", 0.0),  # only the last counts
        ("\\boxed{7} or \\boxed{0.5}", 1.0),
        ("It is 0.5, or 1, or 2", 0.0),
        ("step " * 2000 + "so the answer is 0.5", 1.0),
        ("\\boxed{" + "0" * 2001 + ".5}", 0.0),
        ("", 0.0),
        ("\\boxed{\ud800}", 0.0),
        ("\\boxed{\x00}", 0.0),
    ],
)
def test_only_the_final_answer_counts(completion: str, value: float) -> None:
    assert scored(completion, "0.5").value == value


@pytest.mark.parametrize(
    "completion", ["No solution", "no solution.", r"\boxed{\text{No solution}}", "$\\text{No solution}$"]
)
def test_words(completion: str) -> None:
    assert scored(completion, "No solution").value == 1.0
    assert scored(completion, "One solution").value == 0.0


def test_a_response_that_never_left_its_thinking_has_no_answer() -> None:
    assert scored("the answer is 0.5", "0.5", thinking=True).value == 0.0
    assert scored("hm </think> 0.5", "0.5", thinking=True).value == 1.0


def test_the_question_is_not_its_answer() -> None:
    assert scored(r"\boxed{3+4}", "7", messages=[QUESTION]).value == 0.0
    assert scored(r"\boxed{7}", "7", messages=[{"role": "user", "content": "is it 7?"}]).value == 1.0
    assert scored(r"\boxed{1/2}", "0.5", messages=[{"role": "user", "content": "0.3 or 1/2?"}]).value == 1.0
    assert scored(r"\boxed{3+4}", "7").value == 1.0  # unreduced, but its own


@given(
    st.integers(-999, 999),
    st.integers(1, 99),
    st.integers(2, 9),
    st.sampled_from([r"\frac{{{}}}{{{}}}", "{}/{}", "{} / {}", r"\dfrac{{{}}}{{{}}}"]),
)
@settings(max_examples=40, deadline=None)
def test_fractions_agree_with_exact_arithmetic(p: int, q: int, scale: int, form: str) -> None:
    reference = str(Fraction(p, q))
    assert boxed(form.format(p * scale, q * scale), reference) == 1.0
    assert boxed(form.format(p * scale + 1, q * scale), reference) == 0.0


@given(st.text(st.characters(), max_size=60), st.sampled_from(["7", "x^2", "East", "(0,1]"]))
@settings(max_examples=60, deadline=None)
def test_no_text_raises_or_is_right_by_luck(completion: str, reference: str) -> None:
    score = scored(completion, reference)
    assert score.value in (0.0, 1.0)
    if reference.lower() not in completion.lower() and not any(character.isdigit() for character in completion):
        assert score.value == 0.0


@pytest.mark.parametrize("reference", ["0/0", "1/0", "", " ", "\\boxed{}", "9" * 2001, "<think>"])
@pytest.mark.parametrize("completion", ["", "\\boxed{7}", "9" * 5000])
def test_an_unreadable_reference_is_a_failure_that_names_the_row(reference: str, completion: str) -> None:
    score = scored(completion, reference)
    assert score.failure is Failure.UNPARSABLE_REFERENCE
    assert "row 7" in score.detail and reference[:20] in score.detail


@pytest.mark.parametrize("answer", [BOMB, "x" + BOMB, SLOW_TO_READ])
def test_a_bomb_costs_about_a_second_and_is_wrong(answer: str) -> None:
    boxed("1", "1")  # the pool is open
    began = time.monotonic()
    assert boxed(answer, "1/3") == 0.0
    assert time.monotonic() - began < 4
    began = time.monotonic()
    assert boxed(answer, "1/3") == 0.0  # the other samples of the group
    assert time.monotonic() - began < 0.5
    assert boxed("1/4", "0.25") == 1.0


def test_a_reference_that_is_a_bomb_is_the_row_s_failure() -> None:
    assert scored(r"\boxed{7}", BOMB).failure is Failure.UNPARSABLE_REFERENCE
    began = time.monotonic()
    assert scored(rf"\boxed{{{BOMB}}}", BOMB).failure is Failure.UNPARSABLE_REFERENCE
    assert time.monotonic() - began < 0.5  # it is known


def test_a_comparison_that_hangs_though_neither_side_does_is_a_timeout() -> None:
    score = scored(r"\boxed{\cos^{20} y}", r"\sin^{20} x")  # 0.04 s and 0.02 s alone, 15 s together
    assert score.failure is Failure.TIMEOUT and "row 7" in score.detail


def test_many_bombs_do_not_starve_what_comes_after() -> None:
    math = Math(timeout_s=0.1)

    async def all_at_once() -> list[Score]:
        bombs = [math(Sample(rf"\boxed{{{n}^{{9^{{9^9}}}}}}", "7")) for n in range(2, 12)]
        honest = [math(Sample(rf"\boxed{{{n}/2}}", str(n / 2))) for n in range(1, 40, 2)]
        scores = await asyncio.wait_for(asyncio.gather(*bombs, *honest), 20)
        await math.aclose()
        return scores

    assert [score.value for score in asyncio.run(all_at_once())] == [0.0] * 10 + [1.0] * 20


def test_a_megabyte_is_answered_at_once() -> None:
    began = time.monotonic()
    assert scored("\\boxed{" + "1+" * 500_000 + "1}", "7").value == 0.0
    assert scored("1+" * 500_000 + "1", "7").value == 0.0
    assert time.monotonic() - began < 4


def workers(parent: int) -> list[psutil.Process]:
    return [one for one in psutil.Process(parent).children() if "rlvlm_rewards.math.worker" in one.cmdline()]


def test_a_reader_that_crashes_costs_its_answer_and_a_worker_that_is_killed_nothing() -> None:
    math = Math(workers=1, timeout_s=30)
    before = {one.pid for one in workers(os.getpid())}
    assert scored(r"\boxed{1}", "1", math).value == 1.0
    (worker,) = [one for one in workers(os.getpid()) if one.pid not in before]
    (reader,) = worker.children()
    threading.Timer(0.5, lambda: reader.send_signal(signal.SIGSEGV)).start()
    began = time.monotonic()
    assert scored(rf"\boxed{{{SLOW_TO_READ}}}", "1", math).value == 0.0
    assert 0.4 < time.monotonic() - began < 4
    worker.kill()
    assert scored(r"\boxed{2}", "2", math).value == 1.0
    asyncio.run(math.aclose())
    assert {one.pid for one in workers(os.getpid())} <= before


def test_a_reader_retires_and_its_successor_goes_on() -> None:
    short = "worker._SERVES = 3; sys.exit(worker.main(os.getppid(), 1))"
    script = f"import os, sys; from rlvlm_rewards.math import worker; {short}"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        readers = set()
        assert receive(process.stdout.fileno()) == {"ready": process.pid}
        for number in range(8):
            question = pool.Question(f"{number}/2", f"{number}", boxed=True, in_prompt=False)
            send(process.stdin.fileno(), {"id": number + 1, **dataclasses.asdict(question)})
            assert receive(process.stdout.fileno()) == {"id": number + 1, "outcome": "wrong" if number else "right"}
            readers |= {one.pid for one in psutil.Process(process.pid).children()}
        assert len(readers) >= 3  # 3 + 3 + 2
        send(process.stdin.fileno(), {})  # what is no question ends reader and worker
        assert process.wait(5) == worker._BROKEN


def test_a_lying_reader_is_replaced_and_then_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    lies = iter([{"id": 1, "outcome": "right!"}, {"id": 1, "died": "x", "stage": 9}, {"id": 1}, {"id": 1, "stage": 2}])
    true_receive = pool.receive
    monkeypatch.setattr(pool, "receive", lambda descriptor: next(lies) if true_receive(descriptor).get("id") else {})
    math = Math(workers=1)
    assert scored(r"\boxed{1}", "1", math).failure is Failure.INFRASTRUCTURE
    assert scored(r"\boxed{1}", "1", math).failure is Failure.INFRASTRUCTURE
    monkeypatch.undo()
    assert scored(r"\boxed{1}", "1", math).value == 1.0
    asyncio.run(math.aclose())


def test_the_caller_loads_no_sympy() -> None:
    script = "import sys; from rlvlm_rewards import load_reward; load_reward('math'); assert 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_when_no_process_starts_it_is_a_failure_that_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('not on this machine')")
    environment = pool._environment()
    shadowed = {**environment, "PYTHONPATH": os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])}
    monkeypatch.setattr(pool, "_environment", lambda: shadowed)
    math = Math(workers=1)
    score = scored(r"\boxed{1}", "1", math)
    assert score.failure is Failure.INFRASTRUCTURE
    assert "not on this machine" in score.detail
    monkeypatch.undo()
    assert scored(r"\boxed{1}", "1", math).value == 1.0  # failures are not remembered
    asyncio.run(math.aclose())


def test_right_from_any_thread_and_event_loop() -> None:
    values: list[float | None] = []

    async def many(start: int) -> None:
        samples = [Sample(rf"\boxed{{{n}}}", f"{n}.0") for n in range(start, start + 20)]
        values.extend(score.value for score in await asyncio.gather(*map(MATH, samples)))

    threads = [threading.Thread(target=lambda start=start: asyncio.run(many(start))) for start in (100, 110, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert values == [1.0] * 80


def test_who_gives_up_leaves_the_pool_well() -> None:
    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(MATH(Sample(rf"\boxed{{5^{{{BOMB}}}}}", "5")), 0.05)

    asyncio.run(impatient())
    assert boxed("0.75", "3/4") == 1.0


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}])
def test_options_are_checked(options: dict[str, float]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=rf"{name} is {value}; give"):
        Math(**options)


SCRIPT = """
import asyncio, os, sys
import psutil
from rlvlm_rewards import Sample
from rlvlm_rewards.math import Math

math = Math(timeout_s=60)
right = lambda n: asyncio.run(math(Sample(f"{n}", f"{n}.0"))).value
async def hang():
    task = asyncio.ensure_future(math(Sample(r"\\boxed{9^{9^{9^9}}}", "7")))
    await asyncio.sleep(0.5)
    print(*(one.pid for one in psutil.Process().children(recursive=True)), flush=True)
    if END == "kill":
        os.kill(os.getpid(), 9)
assert right(1) == 1.0
if END == "fork":
    child = os.fork()
    if child == 0:
        os._exit(0 if right(2) == 1.0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right(3) == 1.0
asyncio.run(hang())
"""


@pytest.mark.parametrize("end", ["kill", "exit", "fork"])
def test_nothing_is_left_of_a_parent_that_ends_in_the_middle_of_a_bomb(end: str) -> None:
    script = f"END = {end!r}\n{textwrap.dedent(SCRIPT)}"
    # asyncio.run ends by cancelling what hangs; the interpreter then exits, with the bomb ticking
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
    started = list(map(int, done.stdout.split()))
    assert len(started) == 4  # two workers and their readers
    deadline = time.monotonic() + 3
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in started if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
