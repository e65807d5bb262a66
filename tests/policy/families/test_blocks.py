"""LLaVA, BLIP-2 and InstructBLIP: pictures that take a fixed number of places, plain positions, and nothing leaks in a
packed row."""

from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import picture, task

from policy.families import blip2, instructblip, llava
from rlvlm.learner.attention import packed, use_packed_attention
from rlvlm.policy.checkpoint import load_policy, save_weights
from rlvlm.policy.family import Family, family_of
from rlvlm.policy.prompts import Prompt, PromptEncoder, stack_images
from rlvlm.recipe.errors import RunError
from rlvlm.records import Row
from rlvlm.tasks.images import ImageStore

BUILDERS = {module.__name__.split(".")[-1]: module for module in (llava, blip2, instructblip)}
PLACES = {
    "llava": (llava.SIDE // llava.PATCH) ** 2,
    "blip2": blip2.QUERIES,
    "instructblip": blip2.QUERIES,
}  # tokens of a picture


class Policy:
    """A family's tiny checkpoint, loaded."""

    def __init__(self, builder: ModuleType, folder, **keywords) -> None:
        builder.build(folder / "hf", seed=3, **keywords)
        self.name, self.folder = builder.__name__.split(".")[-1], folder / "hf"
        self.many_images = not hasattr(builder, "LIMITS")
        self.model, self.processor = load_policy(str(self.folder), "float32")
        self.model.eval()
        use_packed_attention(self.model)
        self.family: Family = family_of(self.model.config, "tiny")
        self.store = ImageStore(folder / "images")
        self.encoder = PromptEncoder(self.processor, self.store, self.model.config)

    def prompt(self, text: str, *seeds: int) -> Prompt:
        """With a picture for each seed."""
        pictures = [picture(seed, 40, 32) for seed in seeds]
        return self.encoder.prompt(task(f"{text}{seeds}", self.store, text, *pictures))


@pytest.fixture(scope="module", params=list(BUILDERS))
def policy(request, tmp_path_factory) -> Policy:
    return Policy(BUILDERS[request.param], tmp_path_factory.mktemp(request.param))


Sequence = tuple[Prompt, tuple[int, ...]]


def _row(family: Family, sequences: list[Sequence]) -> Row:
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


def _packed(policy: Policy, sequences: list[Sequence]) -> list[torch.Tensor]:
    """Logits of each sequence of a row, [T, V]."""
    row = _row(policy.family, sequences)
    with packed(row.segment_T):
        logits_TV = policy.family.head(policy.model)(policy.family.hidden(policy.model, row))
    return [logits_TV[row.segment_T == s] for s in range(len(sequences))]


def _alone(policy: Policy, prompt: Prompt, response: tuple[int, ...]) -> torch.Tensor:
    """Logits [T, V] by transformers' own forward of its own class, which works positions out itself; BLIP-2's takes no
    prompt without a picture, so there it is the language model's."""
    ids = torch.tensor([prompt.input_ids + response])
    model = policy.model
    if policy.name == "llava":
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **prompt.images).logits[0]
    if not prompt.images:
        return model.language_model(input_ids=ids).logits[0]
    return type(model).__mro__[2].forward(model, input_ids=ids, **prompt.images).logits[0]


def _sequences(policy: Policy) -> list[Sequence]:
    """One picture, text, three pictures (or one again), text."""
    many = (2, 3, 4) if policy.many_images else (2,)
    return [
        (policy.prompt("what is the sum ?", 1), (300, 301, 302, 303)),
        (policy.prompt("what is left ?"), (310, 311)),
        (policy.prompt("sum of digits ?", *many), (320, 321, 322, 323, 324)),
        (policy.prompt("of ?"), (330,)),
    ]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_text_starts_once_as_the_tokenizer_has_it(policy):
    """Published templates of LLaVA leave the start of sequence to the tokenizer. BLIP-2's pictures stand before it."""
    words = policy.processor.tokenizer
    start, image, places = words.bos_token_id, policy.model.config.image_token_id, PLACES[policy.name]
    text, one = policy.prompt("what is left ?"), policy.prompt("what is left ?", 1)
    assert [list(p.input_ids).count(start) for p in (text, one)] == [1, 1]
    assert text.input_ids[0] == start and text.text_ids == text.input_ids
    rest = [i for i in one.input_ids if i != image]
    assert len(one.input_ids) == len(rest) + places
    if policy.name == "llava":
        assert words.decode(one.input_ids).startswith("<s>USER: " + "<image>" * places + "\nwhat is left ?")
        assert one.text_ids.count(image) == 1
    else:
        assert one.input_ids == (image,) * places + text.input_ids
        assert one.text_ids == text.input_ids


def test_a_template_that_writes_the_start_itself_does_not_get_it_twice(policy, tmp_path):
    encoder = PromptEncoder(policy.processor, policy.store, policy.model.config)
    before = policy.processor.chat_template
    policy.processor.chat_template = "{{ bos_token }}" + before
    try:
        for pictures in ((), (picture(1, 40, 32),)):
            prompt = encoder.prompt(task(f"w{len(pictures)}", policy.store, "what is left ?", *pictures))
            written = policy.prompt("what is left ?", *range(1, 1 + len(pictures)))
            assert prompt.input_ids == written.input_ids and prompt.text_ids == written.text_ids
    finally:
        policy.processor.chat_template = before


def test_pictures_and_only_pictures_cannot_be_sampled(policy):
    banned = policy.family.placeholder_ids(policy.model.config)
    assert policy.processor.tokenizer.convert_ids_to_tokens(banned) == ["<image>"]


def test_positions_count_tokens_and_a_response_goes_on(policy):
    prompt = policy.prompt("what is left ?", 1)
    length = len(prompt.input_ids)
    assert prompt.position_ids.tolist() == [list(range(length))]
    assert policy.family.continued(prompt.position_ids, 2).tolist() == [[length, length + 1]]


def test_blip2_refuses_a_second_picture(tmp_path):
    policy = Policy(blip2, tmp_path)
    with pytest.raises(RunError, match="a task has 2 pictures, and BLIP-2 takes one a prompt; keep tasks with one"):
        policy.prompt("sum ?", 1, 2)


def test_blip2_gets_the_papers_words_for_a_question(tmp_path):
    """Its checkpoints have no chat template."""
    policy = Policy(blip2, tmp_path)
    assert not (policy.folder / "chat_template.jinja").exists()
    said = policy.processor.tokenizer.decode(policy.prompt("what is left ?").input_ids)
    assert said == "</s>Question: what is left ? Answer: <think>"


# --- packed = separate -----------------------------------------------------------------------------------------------


def test_logits_in_a_row_are_those_of_the_sequence_alone(policy):
    sequences = _sequences(policy)
    with torch.no_grad():
        for logits, (prompt, response) in zip(_packed(policy, sequences), sequences, strict=True):
            torch.testing.assert_close(logits, _alone(policy, prompt, response), atol=1e-5, rtol=0)


def test_gradients_through_a_row_are_those_of_the_sequences_alone(policy):
    """Of the responses' log-probs, each sequence with a weight of its own, for every parameter that trains."""
    model, sequences = policy.model, _sequences(policy)

    def weighted(logits_TV: torch.Tensor, s: int) -> torch.Tensor:
        response = torch.tensor(sequences[s][1])
        logp = logits_TV[-len(response) - 1 : -1].log_softmax(-1).gather(1, response[:, None])
        return (s - 1.5) * logp.sum()

    found = []
    for logits in (lambda s: _packed(policy, sequences)[s], lambda s: _alone(policy, *sequences[s])):
        model.zero_grad()
        for s in range(len(sequences)):
            weighted(logits(s), s).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    row, alone = found
    assert row.keys() == alone.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in alone.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(row[name], gradient, atol=2e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    patches = next(name for name in row if name.endswith("embeddings.patch_embedding.weight"))
    assert float(row[patches].abs().max()) > 1e-3
    model.zero_grad()


def test_a_sequence_never_moves_its_neighbours(policy):
    first = {
        "as it was": (policy.prompt("what is left ?", 1), (300, 301, 302)),
        "another picture": (policy.prompt("what is left ?", 50), (300, 301, 302)),
        "another response": (policy.prompt("what is left ?", 1), (305, 306, 307)),
    }
    after = _sequences(policy)[1:3]
    with torch.no_grad():
        rows = {change: _packed(policy, [sequence, *after]) for change, sequence in first.items()}
    before = rows.pop("as it was")
    for changed in rows.values():
        assert float((changed[0] - before[0]).abs().max()) > 0.05
        for neighbour in (1, 2):
            torch.testing.assert_close(changed[neighbour], before[neighbour], atol=1e-5, rtol=0)


# --- groups and checkpoints ------------------------------------------------------------------------------------------

GROUPS = {
    "llava": {"vision": ("model.vision_tower.",), "projector": ("model.multi_modal_projector.",)},
    "blip2": {"vision": ("vision_model.",), "projector": ("query_tokens", "qformer.", "language_projection.")},
}
PUBLISHED = {
    "llava": {
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
    },
    "blip2": {
        "language_model.model.decoder.layers.1.fc1.bias",
        "language_projection.weight",
        "qformer.encoder.layer.0.crossattention.attention.key.weight",
        "query_tokens",
        "vision_model.encoder.layers.1.self_attn.qkv.bias",
    },
    "instructblip": {
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "qformer.embeddings.word_embeddings.weight",
        "qformer.encoder.layer.0.intermediate.dense.weight",
        "query_tokens",
    },
}


GROUPS["instructblip"] = GROUPS["blip2"]


def test_freeze_groups(policy):
    expected = GROUPS[policy.name] | {"language": ("model.language_model.", "language_model.", "lm_head.")}
    groups: dict[str, set[str]] = {}
    for name, _ in policy.model.named_parameters():
        groups.setdefault(policy.family.group_of(name), set()).add(name)
    assert groups.keys() == expected.keys()
    assert all(name.startswith(expected[group]) for group, names in groups.items() for name in names)


def test_weights_have_the_names_of_published_checkpoints_and_come_back(policy, tmp_path):
    written = load_file(policy.folder / "model.safetensors")
    assert PUBLISHED[policy.name] <= written.keys()
    save_weights(policy.model, policy.model.state_dict(), tmp_path / "push.safetensors")
    pushed = load_file(tmp_path / "push.safetensors")
    assert pushed.keys() == written.keys()
    assert all(torch.equal(pushed[name], tensor) for name, tensor in written.items())
    # `spread` left no matrix as a fresh model has it, so what was not found in the file would show
    matrices = [p for n, p in policy.model.named_parameters() if p.dim() > 1 and p.numel() > 200]
    assert all(0.08 < float(p.detach().std()) < 0.12 for p in matrices)


@pytest.mark.parametrize(("layer", "frozen"), [(-2, {"2"}), (-1, set()), (1, {"1", "2"}), ([1, 2], {"2"})])
def test_llavas_tower_trains_up_to_the_deepest_layer_that_is_read(layer, frozen, tmp_path):
    """Of its three. Which layers a gradient reaches is what autograd says."""
    llava.build(tmp_path, seed=1, feature_layer=layer)
    model, _ = load_policy(str(tmp_path), "float32")
    ids = torch.tensor([[model.config.image_token_id] * 16 + [300, 301]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32)).logits.sum().backward()
    tower = {n: p for n, p in model.named_parameters() if "vision_tower" in n}
    assert {n for n, p in tower.items() if p.grad is not None} == {n for n, p in tower.items() if p.requires_grad}
    assert {n.split(".layers.")[1][0] for n, p in tower.items() if ".layers." in n and not p.requires_grad} == frozen


def test_llava_on_mistral(tmp_path):
    policy = Policy(llava, tmp_path, language="mistral")
    sequences = _sequences(policy)
    with torch.no_grad():
        for logits, (prompt, response) in zip(_packed(policy, sequences), sequences, strict=True):
            torch.testing.assert_close(logits, _alone(policy, prompt, response), atol=1e-5, rtol=0)
