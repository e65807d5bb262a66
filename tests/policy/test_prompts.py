"""From a task to tokens: placeholders, what counts as seen, and what decoding keeps."""

import pytest
import torch
from tiny_policy import build, picture, task

from rlvlm.policy.family import Family, family_of
from rlvlm.policy.prompts import PromptEncoder, stack_images
from rlvlm.records import Chain, Seen, Task
from rlvlm.tasks.images import ImageStore

_PAD = 8  # <|media_pad|>


@pytest.fixture(scope="module")
def policy():
    return build()


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


@pytest.fixture
def encoder(policy, store):
    return PromptEncoder(policy[1], store, policy[0].config)


def _pieces(encoder, ids):
    return [encoder.piece(i) for i in ids]


def test_a_prompt_token_by_token(encoder, store):
    prompt = encoder.prompt(task("t", store, "sum of digits ?", picture(0, 16, 16)))
    pieces = [
        "<|im_user|>",
        "user",
        "<|im_middle|>",
        "<|media_begin|>",
        "image",
        "<|media_content|>",
        "<|media_pad|>",
        "<|media_end|>",
        "sum",
    ]
    pieces += [" of", " digits", " ?", *["<|im_end|>", "<|im_assistant|>", "assistant", "<|im_middle|>", "<think>"]]
    assert _pieces(encoder, prompt.text_ids) == pieces


@pytest.mark.parametrize(("sizes", "expected"), [([(16, 16)], [1]), ([(48, 32)], [6]), ([(32, 16), (64, 64)], [2, 16])])
def test_a_picture_takes_a_quarter_of_its_patches(encoder, store, sizes, expected):
    prompt = encoder.prompt(task("t", store, "sum ?", *(picture(i, *size) for i, size in enumerate(sizes))))
    assert prompt.text_ids.count(_PAD) == len(sizes)
    expanded = []
    for token in prompt.text_ids:
        expanded += [_PAD] * expected[len([t for t in expanded if t == 9])] if token == _PAD else [token]
    assert prompt.input_ids == tuple(expanded)  # the placeholder is repeated in its place, nothing else changes
    assert prompt.images["image_grid_thw"].prod(1).tolist() == [4 * n for n in expected]
    assert prompt.images["pixel_values"].shape == (4 * sum(expected), 3, 8, 8)
    assert set(prompt.images) == {"pixel_values", "image_grid_thw"}


def test_without_pictures_nothing_is_expanded(encoder, store):
    prompt = encoder.prompt(task("t", store, "sum ?"))
    assert prompt.text_ids == prompt.input_ids
    assert prompt.images == {} and _PAD not in prompt.input_ids


def test_a_task_is_encoded_once(policy, tmp_path):
    loads = []
    store = ImageStore(tmp_path, cached=1)

    def load(seed):
        loads.append(seed)
        return picture(seed, 16, 16)

    keys = [store.add_lazy(bytes([seed]), lambda seed=seed: load(seed)) for seed in (1, 2)]
    encoder = PromptEncoder(policy[1], store, policy[0].config)
    content = [{"type": "image"}, {"type": "text", "text": "sum ?"}]
    one, two = (Task(key, ({"role": "user", "content": content},), (key,), "7", "exact", 1, "s") for key in keys)
    first = encoder.prompt(one)
    encoder.prompt(two)  # pushes the first picture out of the store's cache
    assert encoder.prompt(one) is first
    assert loads == [1, 2]


def test_a_response_token_by_token(encoder):
    chain = Chain.of(["a1", Seen("3"), ";", "a2", Seen("47"), "so", "50"])
    response = encoder.response(chain, "50")
    pieces = ["a1", " 3", " ;", " a2", " 47", " so", " 50", "</think>", "50", "<|im_end|>"]
    assert _pieces(encoder, response.token_ids) == pieces
    assert [piece for piece, seen in zip(pieces, response.seen_T, strict=True) if seen] == [" 3", " 47"]


def test_seen_words_that_are_spelled_and_that_begin_the_chain(encoder):
    response = encoder.response(Chain.of([Seen("a1"), "zq", Seen("zé"), "so"]), "7")
    seen = dict(zip(range(99), response.seen_T, strict=False))
    # a1 | ' ' z q | ' ' z c3 a9 | ' so' | </think> 7 <|im_end|>
    assert len(response.token_ids) == 1 + 3 + 4 + 1 + 3
    assert [i for i in seen if seen[i]] == [0, 5, 6, 7]


def test_a_chain_without_marks_has_nothing_seen(encoder):
    assert not any(encoder.response(Chain("a1 3"), "3").seen_T)


def test_response_follows_the_prompt_as_the_template_would_render_it(encoder, policy, store):
    """Prompt + response = the whole conversation as one string, tokenised at once."""
    question = task("t", store, "sum ?")
    ids = [*encoder.prompt(question).text_ids, *encoder.response(Chain("a1 3"), "3").token_ids]
    asked = "<|im_user|>user<|im_middle|>sum ?<|im_end|>"
    whole = f"{asked}<|im_assistant|>assistant<|im_middle|><think>a1 3</think>3<|im_end|>"
    assert ids == policy[1].tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_decode_drops_end_of_turn_and_padding_and_keeps_the_end_of_thought(encoder):
    ids = encoder.response(Chain("a1 3"), "zé 3").token_ids
    assert encoder.decode([*ids, 0, 0]) == "a1 3</think>zé 3"
    assert encoder.decode(ids[:-1]) == "a1 3</think>zé 3"


def test_placeholders_are_all_marks_that_open_close_or_stand_for_pictures(policy):
    config = policy[0].config
    ids = family_of(config, "tiny").placeholder_ids(config)
    assert ids == (6, 8, 9, 10)
    assert {policy[1].tokenizer.convert_ids_to_tokens(i) for i in ids} == {
        "<|media_begin|>",
        "<|media_pad|>",
        "<|media_end|>",
        "<|kimi_k25_video_placeholder|>",
    }


def test_placeholders_outside_the_vocabulary_cannot_be_sampled_and_are_left_out():
    config = build()[0].config
    config.video_token_id = config.text_config.vocab_size
    config.vision_end_token_id = 10**6
    assert family_of(config, "tiny").placeholder_ids(config) == (6, 8)


def test_stacked_pictures_keep_their_order():
    one = {"pixel_values": torch.zeros(4, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    two = {"pixel_values": torch.ones(8, 3), "image_grid_thw": torch.tensor([[1, 2, 4]])}
    stacked = stack_images([one, {}, two])
    assert stacked["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4]]
    assert stacked["pixel_values"].sum(1).tolist() == [0.0] * 4 + [3.0] * 8
    assert stack_images([{}, {}]) == {}


def test_pictures_as_the_engines_processor_takes_them(encoder):
    images = [picture(0, 16, 16), picture(1, 16, 16)]
    assert encoder.family.engine_images([], []) == {}
    assert encoder.family.engine_images(images, ["k", "l"]) == {
        "multi_modal_data": {
            "vision_chunk": [
                {"type": "image", "image": images[0], "uuid": "k"},
                {"type": "image", "image": images[1], "uuid": "l"},
            ]
        }
    }
    assert Family().engine_images(images, ["k", "l"]) == {
        "multi_modal_data": {"image": images},
        "multi_modal_uuids": {"image": ["k", "l"]},
    }
