'''The base class of task generators: one small class gives pictures, questions, chains to imitate, and a verifier.

A whole generator of your own, in `dots.py`; a recipe names it `generator: dots.py:Dots`:

```python
from PIL import Image, ImageDraw

from rlvlm.tasks.generator import Generator, Scene, Step


class Dots(Generator):
    """How many dots are in all rows together?"""

    name = "dots"
    levels = (1, 2, 3)

    def draw(self, rng, level, split):
        image = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(image)
        rows = [rng.randint(0, 4) for _ in range(level + 1)]
        for row, dots in enumerate(rows):
            for dot in range(dots):
                x, y = 16 * dot + rng.randint(3, 7), 16 * row + rng.randint(3, 7)
                pen.ellipse((x, y, x + 6, y + 6), fill="black")
        return Scene(image, facts=rows)

    def ask(self, scene):
        return "how many dots ?"

    def solve(self, scene):
        return str(sum(scene.facts))

    def explain(self, scene):
        steps, total = [], 0
        for name, dots in zip("abcd", scene.facts, strict=False):
            total += dots
            steps.append(Step(where=f"row-{name}", seen=dots, running=total))
        return steps
```

That is all: the messages, the three chain styles, the split into training and held-out tasks, and the reward
(`dots.py:Dots.verify`) come from `Generator`. Leave `explain` out where there is nothing to imitate; override `verify`
where an answer is more than a word or a number.
'''

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, NamedTuple, TypeVar

from PIL import Image

from rlvlm.records import Chain, Seen, Task
from rlvlm.tasks.errors import BadGeneratorError, TooFewTasksError
from rlvlm.tasks.images import ImageStore, content_key

if TYPE_CHECKING:
    from rlvlm_rewards.records import Sample

Split = Literal["train", "held_out"]
Facts = TypeVar("Facts")

# Bounded, so that a generator with too few different scenes fails instead of hanging. A held-out scene is one in ten:
# the chance to miss it 2,000 times in a row is 1e-91.
MAX_TRIES = 2000

# The digits are bounded because Python refuses to parse endless ones, and a response may hold anything.
_NUMBER = re.compile(r"[+-]?\d{1,30}(\.\d{1,30})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Scene(Generic[Facts]):
    """A picture and the facts it was drawn from (whatever the generator needs to ask, solve and explain)."""

    image: Image.Image
    facts: Facts


class Step(NamedTuple):
    """One look at the picture: where, what is seen there, and the result up to here. Each becomes one word of a chain,
    so none may hold a blank."""

    where: str
    seen: str | int
    running: str | int


class Generator(Generic[Facts]):
    """Draws tasks with verifiable answers. Implement `draw`, `ask` and `solve`; `explain` if SFT shall imitate chains.

    name: the name of the source in tasks and reports (default: the class name). levels: the difficulties it can draw.
    styles: the chain styles it can write. reward: how `load_reward` finds the verifier; default: this class's `verify`.
    """

    name: ClassVar[str] = ""
    levels: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5)
    styles: ClassVar[tuple[str, ...]] = ("short", "medium", "verbose")
    reward: str = ""

    def __init_subclass__(cls) -> None:
        if not cls.name:
            cls.name = cls.__name__

    def draw(self, rng: random.Random, level: int, split: Split) -> Scene[Facts]:
        """A scene of this level, by `rng` alone. `split` is for generators whose raw material (scans, photographs) must
        not be shared; every other may ignore it, since `make_task` keeps the splits apart."""
        raise NotImplementedError

    def ask(self, scene: Scene[Facts]) -> str:
        """The question: few words of a small, fixed vocabulary, separated by blanks."""
        raise NotImplementedError

    def solve(self, scene: Scene[Facts]) -> str:
        """The reference answer, from the facts."""
        raise NotImplementedError

    def explain(self, scene: Scene[Facts]) -> Sequence[Step]:
        """The steps from the picture to the answer; none means that there is no chain to imitate."""
        return ()

    def words(self, scene: Scene[Facts], style: str) -> list[str]:
        """The words of a chain in this style; what was read off the picture is a `Seen`.

        short: `a1 (7) a2 (12)`. medium: `a1 7 (7) a2 5 (12)`. verbose: medium, `check`, medium again.
        """
        steps = self.explain(scene)
        if style == "short":
            return [word for step in steps for word in (step.where, f"({step.running})")]
        medium = [word for step in steps for word in (step.where, Seen(step.seen), f"({step.running})")]
        if style == "medium" or not medium:
            return medium
        if style == "verbose":
            return [*medium, "check", *medium]
        raise ValueError(f"{type(self).__name__} cannot write chains in the style {style!r}: override `words`")

    def identity(self, scene: Scene[Facts]) -> bytes:
        """What makes two scenes the same scene when train and held-out are told apart: the pixels or, better, the facts
        where pixels also differ by noise that does not matter."""
        return scene.image.tobytes()

    @staticmethod
    def verify(sample: Sample) -> float:
        """1.0 if what stands after the last `</think>` equals the reference answer, as a number or as text without
        regard to capitals and blanks; else 0.0, also for a response that never stops thinking."""
        _, mark, answer = sample.completion.rpartition("</think>")
        return float(bool(mark) and same_answer(answer, sample.answer))


def same_answer(given: str, reference: str) -> bool:
    """Whether both are the same number, or the same text without regard to capitals and blanks."""
    given, reference = (" ".join(text.split()).casefold() for text in (given, reference))
    if _NUMBER.fullmatch(given) and _NUMBER.fullmatch(reference):
        return Fraction(given) == Fraction(reference)
    return given == reference


def split_of(identity: bytes) -> Split:
    """One in ten, by its hash alone, is held out: the same in every run, whatever the seed."""
    return "held_out" if int.from_bytes(hashlib.sha256(identity).digest()[:8], "big") % 10 == 0 else "train"


def user_message(text: str, pictures: int = 1) -> dict[str, object]:
    """One user turn in the format of transformers' chat templates: the pictures, then the text."""
    return {"role": "user", "content": [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]}


def make_task(
    generator: Generator[Facts],
    rng: random.Random,
    level: int,
    split: Split,
    store: ImageStore,
    *,
    prefix: str | None = None,
    used: set[str] | None = None,
    key: str = "generator",
) -> Task:
    """Draws scenes until one belongs to `split` and is not in `used`, and makes it a task.

    prefix: start of the id; what follows is a hash of picture and question, so that ids of different pools never mean
    different tasks. used: the fingerprints (picture + question) of the pool so far; the new one is added.
    key: the recipe key for messages. Raises TooFewTasksError if MAX_TRIES scenes do not give a new one, and
    BadGeneratorError if a chain's word has a blank or the class cannot be imported.
    """
    used = set() if used is None else used
    for _ in range(MAX_TRIES):
        scene = generator.draw(rng, level, split)
        question = generator.ask(scene)
        if split_of(generator.identity(scene) + question.encode()) != split:
            continue
        picture = content_key(scene.image)
        fingerprint = hashlib.sha256(f"{picture} {question}".encode()).hexdigest()
        if fingerprint not in used:
            used.add(fingerprint)
            store.add(scene.image)
            break
    else:
        problem = (
            f"{MAX_TRIES} draws gave no new {split} scene of level {level} after {len(used)} different ones in the pool"
        )
        mend = "let draw() vary more, or ask for fewer tasks (sft.examples, rl.pool, sft.gate.tasks, evaluation.tasks)"
        raise TooFewTasksError(key, generator.name, problem, mend)
    return Task(
        id=f"{prefix or f'{generator.name}-{split}'}-{fingerprint[:8]}",
        messages=(user_message(question),),
        images=(picture,),
        answer=generator.solve(scene),
        reward=reward_of(generator, key),
        level=level,
        source=generator.name,
        chains=_chains(generator, scene, key),
    )


def reward_of(generator: Generator[Facts], key: str = "generator") -> str:
    """How `load_reward` finds the verifier. Raises BadGeneratorError for a class that no other process can import."""
    cls = type(generator)
    if generator.reward:
        return generator.reward
    if "<locals>" in cls.__qualname__:
        problem = "its verifier cannot be imported, because the class stands inside a function"
        raise BadGeneratorError(key, cls.__qualname__, problem, "move the class to the top level of its file")
    return f"{cls.__module__}:{cls.__qualname__}.verify"


def _chains(generator: Generator[Facts], scene: Scene[Facts], key: str) -> dict[str, Chain]:
    chains = {}
    for style in generator.styles:
        words = generator.words(scene, style)
        # Every word has to become one token of the tiny policy, and `Seen` spans whole words.
        broken = next((word for word in words if not word or any(letter.isspace() for letter in word)), None)
        if broken is not None:
            mend = "join it by a hyphen, or make it several words"
            raise BadGeneratorError(
                key, generator.name, f"the word {broken!r} of a {style} chain is empty or has a blank", mend
            )
        if words:
            chains[style] = Chain.of(words)
    return chains
