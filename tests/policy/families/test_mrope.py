"""Qwen2-VL, Qwen2.5-VL and the thinker of Qwen2.5-Omni: four rows of positions, and nothing leaks in a packed row."""

from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import picture, task
from transformers import (
    AutoConfig,
    PreTrainedModel,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from policy.families import qwen2_5_omni, qwen2_5_vl, qwen2_vl
from rlvlm.learner.attention import packed, use_packed_attention
from rlvlm.policy.checkpoint import load_policy, save_weights
from rlvlm.policy.family import Family, family_of
from rlvlm.policy.prompts import Prompt, PromptEncoder, stack_images
from rlvlm.records import Row
from rlvlm.tasks.images import ImageStore

BUILDERS = {module.__name__.split(".")[-1]: module for module in (qwen2_vl, qwen2_5_vl, qwen2_5_omni)}


class Policy:
    """A family's tiny checkpoint, loaded."""

    def __init__(self, builder: ModuleType, folder) -> None:
        builder.build(folder / "hf", seed=3)
        self.folder = folder / "hf"
        self.model, self.processor = load_policy(str(self.folder), "float32")
        self.model.eval()
        use_packed_attention(self.model)  # outside of `packed` that is plain sdpa
        self.family: Family = family_of(self.model.config, "tiny")
        self.store = ImageStore(folder / "images")
        self.encoder = PromptEncoder(self.processor, self.store, self.model.config)

    def prompt(self, name: str, text: str, *sizes: tuple[int, int], seed: int = 0) -> Prompt:
        pictures = [picture(seed + i, *size) for i, size in enumerate(sizes)]
        return self.encoder.prompt(task(f"{name}{seed}", self.store, text, *pictures))


@pytest.fixture(scope="module", params=list(BUILDERS))
def policy(request, tmp_path_factory) -> Policy:
    return Policy(BUILDERS[request.param], tmp_path_factory.mktemp(request.param))


def _row(family: Family, sequences: list[tuple[Prompt, tuple[int, ...]]]) -> Row:
    """Sequences end to end, every response token trained."""
    ids, segments, positions, trained = [], [], [], []
    for s, (prompt, response) in enumerate(sequences):
        ids += [*prompt.input_ids, *response]
        segments += [s] * (len(prompt.input_ids) + len(response))
        trained += [False] * len(prompt.input_ids) + [True] * len(response)
        positions += [prompt.position_ids, family.continued(prompt.position_ids, len(response))]
    return Row(
        input_ids_T=torch.tensor(ids),
        segment_T=torch.tensor(segments),
        position_ids=torch.cat(positions, dim=1),
        trained_T=torch.tensor(trained),
        advantage_S=torch.ones(len(sequences)),
        group_size_S=torch.ones(len(sequences)),
        engine_logp_T=torch.zeros(len(ids)),
        images=stack_images([prompt.images for prompt, _ in sequences]),
    )


def _packed(policy: Policy, sequences: list[tuple[Prompt, tuple[int, ...]]]) -> list[torch.Tensor]:
    """Logits of each sequence of a row, [T, V], with the attention that the learner has."""
    row = _row(policy.family, sequences)
    with packed(row.segment_T):
        logits_TV = policy.family.head(policy.model)(policy.family.hidden(policy.model, row))
    return [logits_TV[row.segment_T == s] for s in range(len(sequences))]


def _alone(model: PreTrainedModel, prompt: Prompt, response: tuple[int, ...]) -> torch.Tensor:
    """Logits [T, V] by the plain forward, which works positions out itself. mm_token_type_ids marks pictures; the omni
    thinker goes by the ids and has no use for it."""
    ids = torch.tensor([prompt.input_ids + response])
    marks = {"mm_token_type_ids": (ids == model.config.image_token_id).int()}
    marks = {} if "omni" in model.config.model_type else marks
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **marks, **prompt.images).logits[0]


def _sequences(policy: Policy) -> list[tuple[Prompt, tuple[int, ...]]]:
    """Text, one picture, three pictures, text again; the sizes give one window of the vision tower, and several."""
    return [
        (policy.prompt("a", "what is the sum ?", (64, 48)), (300, 301, 302, 303)),
        (policy.prompt("b", "what is left ?"), (310, 311)),
        (policy.prompt("c", "sum of digits ?", (32, 64), (48, 48), (16, 32), seed=7), (320, 321, 322, 323, 324)),
        (policy.prompt("d", "of ?"), (330,)),
    ]


# --- positions -------------------------------------------------------------------------------------------------------


def test_a_picture_counts_as_many_positions_as_its_longer_side(policy):
    """48 x 32 pixels are 6 x 4 patches, 3 x 2 places (paper, figure 3): text to f-1, then time f, height f and f+1,
    width f..f+2, and text on from f+3, three less than the six tokens would take."""
    prompt = policy.prompt("p", "sum ?", (48, 32))
    ids, positions = torch.tensor(prompt.input_ids), prompt.position_ids.tolist()
    placed = (ids == policy.model.config.image_token_id).nonzero()[:, 0].tolist()
    f, after = placed[0], len(ids) - placed[-1] - 1
    assert placed == list(range(f, f + 6))
    rest = list(range(f + 3, f + 3 + after))
    assert positions[0] == list(range(len(ids)))
    assert positions[1] == [*range(f), *[f] * 6, *rest]
    assert positions[2] == [*range(f), *[f] * 3, *[f + 1] * 3, *rest]
    assert positions[3] == [*range(f), *[f, f + 1, f + 2] * 2, *rest]
    goes_on = policy.family.continued(prompt.position_ids, 2).tolist()
    assert goes_on == [[len(ids), len(ids) + 1], *[[len(ids) - 3, len(ids) - 2]] * 3]


def test_a_response_goes_on_after_the_highest_of_the_three_even_if_the_prompt_ends_in_a_picture(policy):
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 2, 3]])
    assert policy.family.continued(positions, 2).tolist() == [[4, 5]] * 4


def test_text_has_the_same_positions_in_all_four_rows(policy):
    prompt = policy.prompt("t", "what is left ?")
    assert prompt.position_ids.tolist() == [list(range(len(prompt.input_ids)))] * 4


def test_the_marks_of_pictures_are_those_of_the_processor(policy):
    prompt = policy.prompt("m", "sum ?", (32, 32), (16, 48))
    keywords = policy.family.token_keywords(policy.model.config, torch.tensor(prompt.input_ids))
    if "omni" in policy.model.config.model_type:
        assert keywords == {}
        return
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "sum ?"}]}]
    text = policy.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    encoded = policy.processor(text=[text], images=[picture(0, 32, 32), picture(1, 16, 48)], return_tensors="pt")
    assert int(encoded["mm_token_type_ids"].sum()) == 4 + 3
    assert torch.equal(keywords["mm_token_type_ids"], encoded["mm_token_type_ids"][0].int())


# --- packed = separate -----------------------------------------------------------------------------------------------


def test_logits_in_a_row_are_those_of_the_sequence_alone(policy):
    sequences = _sequences(policy)
    with torch.no_grad():
        for logits, (prompt, response) in zip(_packed(policy, sequences), sequences, strict=True):
            torch.testing.assert_close(logits, _alone(policy.model, prompt, response), atol=1e-5, rtol=0)


def test_transformers_own_attention_keeps_the_sequences_of_a_row_apart_too(policy):
    """By the fourth row of positions: the learner does not rest on one mechanism alone."""
    sequences = _sequences(policy)
    row = _row(policy.family, sequences)
    with torch.no_grad():
        logits_TV = policy.family.head(policy.model)(policy.family.hidden(policy.model, row))
        for s, (prompt, response) in enumerate(sequences):
            alone = _alone(policy.model, prompt, response)
            torch.testing.assert_close(logits_TV[row.segment_T == s], alone, atol=1e-5, rtol=0)


def test_a_padded_batch_as_sft_has_it_gives_the_same_logits(policy):
    """TRL's loss goes through `base_model`, and the model works positions out by itself."""
    sequences = _sequences(policy)
    longest = max(len(prompt.input_ids) + len(response) for prompt, response in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for s, (prompt, response) in enumerate(sequences):
        length = len(prompt.input_ids) + len(response)
        ids[s, :length] = torch.tensor(prompt.input_ids + response)
        mask[s, :length] = 1
    with torch.no_grad():
        hidden_STH = policy.model.base_model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=False,
            **policy.family.token_keywords(policy.model.config, ids),
            **stack_images([prompt.images for prompt, _ in sequences]),
        ).last_hidden_state
        for s, (prompt, response) in enumerate(sequences):
            alone = _alone(policy.model, prompt, response)
            torch.testing.assert_close(
                policy.family.head(policy.model)(hidden_STH[s, : len(alone)]), alone, atol=1e-5, rtol=0
            )


def test_gradients_through_a_row_are_those_of_the_sequences_alone(policy):
    """Of the responses' log-probs, each sequence with a weight of its own, for every parameter that has a gradient."""
    model, sequences = policy.model, _sequences(policy)

    def weighted(logits_TV: torch.Tensor, s: int) -> torch.Tensor:
        response = torch.tensor(sequences[s][1])
        logp = logits_TV[-len(response) - 1 : -1].log_softmax(-1).gather(1, response[:, None])
        return (s - 1.5) * logp.sum()

    found = []
    for logits in (lambda s: _packed(policy, sequences)[s], lambda s: _alone(model, *sequences[s])):
        model.zero_grad()
        for s in range(len(sequences)):
            weighted(logits(s), s).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    row, alone = found
    assert row.keys() == alone.keys() == {name for name, _ in model.named_parameters() if "audio_tower" not in name}
    for name, gradient in alone.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(row[name], gradient, atol=2e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    patches = next(name for name in row if name.endswith("visual.patch_embed.proj.weight"))
    assert float(row[patches].abs().max()) > 1e-3
    model.zero_grad()


def test_a_sequence_never_moves_its_neighbours(policy):
    first = {
        "as it was": (policy.prompt("l", "what is left ?", (64, 48)), (300, 301, 302)),
        "another picture": (policy.prompt("l", "what is left ?", (64, 48), seed=50), (300, 301, 302)),
        "another response": (policy.prompt("l", "what is left ?", (64, 48)), (305, 306, 307)),
    }
    after = _sequences(policy)[1:3]
    with torch.no_grad():
        rows = {change: _packed(policy, [sequence, *after]) for change, sequence in first.items()}
    before = rows.pop("as it was")
    for changed in rows.values():
        assert float((changed[0] - before[0]).abs().max()) > 0.05
        for neighbour in (1, 2):
            torch.testing.assert_close(changed[neighbour], before[neighbour], atol=1e-5, rtol=0)


# --- checkpoints -----------------------------------------------------------------------------------------------------

LAYER = "layers.1.self_attn.q_proj.bias"
PUBLISHED = {
    "qwen2_vl": {f"model.{LAYER}", "model.embed_tokens.weight", "visual.blocks.1.mlp.fc1.weight"},
    "qwen2_5_vl": {
        f"model.{LAYER}",
        "lm_head.weight",
        "visual.blocks.1.mlp.gate_proj.weight",
        "visual.merger.mlp.0.bias",
    },
    "qwen2_5_omni_thinker": {
        f"thinker.model.{LAYER}",
        "thinker.lm_head.weight",
        "thinker.visual.blocks.1.attn.q.weight",
        "thinker.audio_tower.proj.weight",
    },
}


def test_weights_have_the_names_of_published_checkpoints_and_come_back(policy, tmp_path):
    written = load_file(policy.folder / "model.safetensors")
    assert PUBLISHED[policy.model.config.model_type] <= written.keys()
    save_weights(policy.model, policy.model.state_dict(), tmp_path / "push.safetensors")
    pushed = load_file(tmp_path / "push.safetensors")
    assert pushed.keys() == written.keys()
    assert all(torch.equal(pushed[name], tensor) for name, tensor in written.items())
    # `spread` left no matrix as a fresh model has it, so what was not found in the file would show
    assert all(0.05 < float(p.detach().std()) < 0.2 for _, p in policy.model.named_parameters() if p.dim() > 1)


def test_tied_embeddings_are_written_once(tmp_path):
    qwen2_vl.build(tmp_path, seed=1)
    model, _ = load_policy(str(tmp_path), "float32")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # as ZeRO-3 gives them: no ties
    for state in (model.state_dict(), gathered):
        save_weights(model, state, tmp_path / "push.safetensors")
        for file in ("model.safetensors", "push.safetensors"):
            written = load_file(tmp_path / file)
            assert "lm_head.weight" not in written
            assert torch.equal(written["model.embed_tokens.weight"], model.lm_head.weight)


def test_the_thinkers_checkpoint_is_a_whole_model_without_speech(tmp_path):
    qwen2_5_omni.build(tmp_path, seed=3)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.enable_audio_output) == ("qwen2_5_omni", False)
    with torch.device("meta"):
        whole = Qwen2_5OmniForConditionalGeneration(config)
    assert whole.state_dict().keys() == load_file(tmp_path / "model.safetensors").keys()
    _, info = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_thinker_is_prepared_alike_from_its_own_config_and_from_the_whole_models(tmp_path):
    """A learner has the first, a trainer that holds no model reads the second from the checkpoint."""
    policy = Policy(qwen2_5_omni, tmp_path)
    whole = AutoConfig.from_pretrained(policy.folder)
    assert type(policy.family) is type(family_of(whole, "tiny"))
    prompt = policy.prompt("w", "sum ?", (48, 32), (16, 32))
    from_whole = policy.family.positions(whole, torch.tensor(prompt.input_ids), prompt.images)
    assert torch.equal(from_whole, prompt.position_ids)
    assert policy.family.placeholder_ids(whole) == policy.family.placeholder_ids(policy.model.config)


# --- groups and placeholders -----------------------------------------------------------------------------------------


def test_merger_is_the_projector_tower_is_vision_and_the_rest_is_language(policy):
    groups: dict[str, set[str]] = {}
    for name, _ in policy.model.named_parameters():
        groups.setdefault(policy.family.group_of(name), set()).add(name.removeprefix("model."))
    assert groups.keys() == {"vision", "projector", "language"}
    assert all(name.startswith("visual.merger.") for name in groups["projector"])
    towers = ("visual.blocks.", "visual.patch_embed.", "audio_tower.")
    assert all(name.startswith(towers) for name in groups["vision"])
    assert all(
        name.startswith(("language_model.", "layers.", "embed_tokens.", "norm.", "lm_head."))
        for name in groups["language"]
    )


def test_no_mark_of_a_picture_or_sound_can_be_sampled(policy):
    config = policy.model.config
    banned = policy.processor.tokenizer.convert_ids_to_tokens(policy.family.placeholder_ids(config))
    marks = qwen2_5_omni.MARKS if "omni" in config.model_type else qwen2_vl.MARKS
    assert set(banned) == set(marks.values())
