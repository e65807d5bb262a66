"""The recorder of the engine's routing, on a runner whose every choice can be told from token and position."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlvlm.rollout.routing import EngineRouting, Recorder

_BLOCK = 4
_EXPERTS = ((3, 1), (7, 5))  # two layers with two experts per token: (factor of the token, factor of the position)


def _chosen(layer: int, token: int, position: int) -> list[int]:
    a, b = _EXPERTS[layer]
    return [a * token + position, b * token + 2 * position]


def _expected(tokens: list[int]) -> list:
    return [[_chosen(layer, token, position) for layer in (0, 1)] for position, token in enumerate(tokens)]


@dataclass
class _Request:
    tokens: list[int]
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int = 0


@dataclass
class _Layer:
    capture: object = None

    @property
    def router(self) -> "_Layer":
        return self

    def set_capture_fn(self, capture) -> None:
        self.capture = capture


@dataclass
class _Runner:
    """What the recorder touches of vLLM's model runner."""

    requests: dict[str, _Request] = field(default_factory=dict)
    layers: tuple[_Layer, _Layer] = field(default_factory=lambda: (_Layer(), _Layer()))

    def __post_init__(self) -> None:
        spec = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=_BLOCK))
        self.kv_cache_config = SimpleNamespace(num_blocks=10, kv_cache_groups=[spec])

    def execute_model(self, scheduler_output) -> str:
        self.input_batch = SimpleNamespace(req_ids=list(scheduler_output.num_scheduled_tokens))
        for layer, module in enumerate(self.layers):
            chosen = [
                _chosen(layer, request.tokens[position], position)
                for name, count in scheduler_output.num_scheduled_tokens.items()
                for request in [self.requests[name]]
                for position in range(request.num_computed_tokens, request.num_computed_tokens + count)
            ]
            if chosen:
                module.capture(torch.tensor(chosen))
        return "result"

    def step(self, **scheduled: int) -> None:
        assert self.execute_model(SimpleNamespace(num_scheduled_tokens=scheduled)) == "result"
        for name, count in scheduled.items():
            self.requests[name].num_computed_tokens += count


@pytest.fixture
def runner() -> _Runner:
    return _Runner()


@pytest.fixture
def recorder(runner) -> Recorder:
    return Recorder(runner, runner.layers)


def test_prefill_and_decode_of_several_requests(runner, recorder):
    runner.requests = {"a": _Request([11, 12, 13, 14, 15, 16, 17], ([3, 1],)), "b": _Request([21, 22, 23], ([2],))}
    runner.step(a=5, b=2)
    runner.step(b=1, a=1)
    runner.step(a=1)
    recorded = recorder.take()
    assert recorded["a"].dtype == np.int16
    assert {name: routing.tolist() for name, routing in recorded.items()} == {
        "a": _expected([11, 12, 13, 14, 15, 16, 17]),
        "b": _expected([21, 22, 23]),
    }
    assert recorder.take() == {}


def test_a_prompt_prefilled_in_chunks(runner, recorder):
    runner.requests = {"a": _Request([1, 2, 3, 4, 5, 6, 7, 8, 9], ([5, 6, 7],))}
    for chunk in (4, 3, 2):
        runner.step(a=chunk)
    assert recorder.take()["a"].tolist() == _expected([1, 2, 3, 4, 5, 6, 7, 8, 9])


def test_tokens_out_of_the_prefix_cache_have_the_routing_of_the_block_they_share(runner, recorder):
    """`later` shares its first block with `first` in the very step that fills it, and comes before it in the batch."""
    prompt = [1, 2, 3, 4, 5]
    runner.requests = {"first": _Request([*prompt, 8], ([0, 1],)), "later": _Request([*prompt, 9], ([0, 2],), 4)}
    runner.step(later=1, first=5)
    runner.step(later=1, first=1)
    recorded = recorder.take()
    assert recorded["first"].tolist() == _expected([*prompt, 8])
    assert recorded["later"].tolist() == _expected([*prompt, 9])
    runner.requests = {"next round": _Request([1, 2, 3, 4, 5, 8, 6, 7, 70, 71], ([0, 9, 8],), 4)}
    runner.step(**{"next round": 6})
    assert recorder.take()["next round"].tolist() == _expected([1, 2, 3, 4, 5, 8, 6, 7, 70, 71])


def test_a_request_that_was_put_off_starts_again(runner, recorder):
    runner.requests = {"a": _Request([1, 2, 3, 4, 5, 6], ([0, 1],))}
    runner.step(a=3)
    runner.requests["a"].num_computed_tokens = 0
    runner.requests["a"].block_ids = ([7, 3],)
    runner.step(a=4)
    runner.step(a=2)
    assert recorder.take()["a"].tolist() == _expected([1, 2, 3, 4, 5, 6])


def test_what_was_never_computed_here_is_not_recorded(runner, recorder):
    """A block that came into the cache before recording began."""
    runner.requests = {"a": _Request([1, 2, 3, 4, 5], ([4, 5],), 4)}
    runner.step(a=1)
    recorded = recorder.take()["a"]
    assert recorded[:4].tolist() == [[[-1, -1], [-1, -1]]] * 4
    assert recorded[4].tolist() == _expected([1, 2, 3, 4, 5])[4]


def test_a_step_without_tokens_records_nothing(runner, recorder):
    runner.step()
    assert recorder.take() == {}


def test_a_response_gets_its_own_sample_without_the_last_token():
    routing = EngineRouting()
    data = np.arange(5 * 2 * 2, dtype=np.int16).reshape(5, 2, 2)
    short = data[:2]
    routing._recorded = {
        "0_rl-1/t": (data.shape, data.tobytes()),
        "1_rl-1/t": (short.shape, short.tobytes()),
        "alone": (data.shape, data.tobytes()),
    }
    first, second = SimpleNamespace(index=0), SimpleNamespace(index=1)
    assert routing.of("rl-1/t", first, tokens=5).tolist() == data[:4].tolist()
    assert routing.of("alone", first, tokens=6).tolist() == data.tolist()
    missing = routing.of("rl-1/t", second, tokens=4)
    assert missing.tolist() == [*short.tolist(), [[-1, -1], [-1, -1]]]
    missing[0] = 0  # one's own memory, to be written to
    with pytest.raises(KeyError):
        routing.of("rl-2/t", first, tokens=5)
