"""The judges against scores worked out another way, on small random models saved in the published formats."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import recording
from judges import (
    CPU,
    DIMENSION,
    HEADS,
    LAYERS,
    PATCH,
    SIDE,
    VOCABULARY,
    WIDTH,
    config,
    normalised_pixels,
    open_clip_state,
    save_processor,
)
from PIL import Image
from pipelines import tokenizer
from transformers import CLIPConfig, CLIPModel

from evaluation.open_clip import clip_from_open_clip
from evaluation.protocol import WEIGHT_KEYS
from evaluation.scorers import load_scorer
from ncp.common.errors import UserError
from tiny import oracle, world

PROMPTS = ["a cat", "a much longer prompt about two dogs", "x"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (len(PROMPTS), SIDE, SIDE, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A random CLIP, with quick_gelu and the old end token as OpenAI's repository has them, and its processor."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    text = {**tower, "vocab_size": VOCABULARY, "max_position_embeddings": 77, "eos_token_id": 2}
    vision = {**tower, "image_size": SIDE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIMENSION))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.logit_scale.fill_(math.log(50))
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


def tokens(prompt: str) -> torch.Tensor:
    """(1, L) without padding: one prompt at a time."""
    return torch.tensor([tokenizer()(prompt)["input_ids"]])


def cosines(model: CLIPModel, pictures: list[Image.Image]) -> list[float]:
    """Image by image, prompt by prompt, through the model's own whole forward pass."""
    x = normalised_pixels(pictures)
    with torch.no_grad():
        outputs = [model(input_ids=tokens(p), pixel_values=x[i : i + 1]) for i, p in enumerate(PROMPTS)]
    return [(o.text_embeds @ o.image_embeds.T).item() for o in outputs]


def test_pickscore_is_the_cosine_times_the_exponential_of_the_scale(clip_folder, pictures):
    c = config("--pickscore_model", clip_folder, "--clip_h_processor", clip_folder)
    got = load_scorer("pickscore", c, CPU).score(pictures, PROMPTS)
    expected = [50 * cosine for cosine in cosines(CLIPModel.from_pretrained(clip_folder).eval(), pictures)]
    assert np.ptp(expected) > 0.5
    assert got == pytest.approx(expected, abs=1e-3)


def test_clip_score_is_a_hundred_cosines_and_never_negative(clip_folder, pictures):
    got = load_scorer("clip", config("--clip_l_model", clip_folder), CPU).score(pictures, PROMPTS)
    expected = cosines(CLIPModel.from_pretrained(clip_folder).eval(), pictures)
    assert got == pytest.approx([100 * max(0, cosine) for cosine in expected], abs=1e-3)


def test_other_sizes_are_resized_and_cropped(clip_folder):
    scorer = load_scorer("clip", config("--clip_l_model", clip_folder), CPU)
    gradient = np.tile(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None], (128, 1, 3))
    large = Image.fromarray(gradient)
    small = large.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert scorer.score([large], ["x"]) == pytest.approx(scorer.score([small], ["x"]), abs=1e-3)


# ---------------------------------------------------------------- HPSv2: open_clip's layout


def open_clip_forward(
    state: dict[str, torch.Tensor], pixels: torch.Tensor, prompt: str, activation=torch.nn.functional.gelu
) -> float:
    """open_clip's cosine of one image (1, 3, SIDE, SIDE) and one prompt, written from its definition.

    Attention by torch's own MultiheadAttention, which holds q, k and v fused as open_clip does; the text is padded
    with zeros to 77 and pooled where the token's number is largest.
    """

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    def transformer(x, prefix, mask):
        for n in range(LAYERS):
            at = f"{prefix}transformer.resblocks.{n}."
            attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            attention.load_state_dict({k.removeprefix(at + "attn."): v for k, v in state.items() if at + "attn." in k
                                       and k.startswith(at)})  # fmt: skip
            y = norm(x, at + "ln_1")
            x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = norm(x, at + "ln_2") @ state[at + "mlp.c_fc.weight"].T + state[at + "mlp.c_fc.bias"]
            x = x + activation(y) @ state[at + "mlp.c_proj.weight"].T + state[at + "mlp.c_proj.bias"]
        return x

    with torch.no_grad():
        patches = torch.nn.functional.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).mT
        x = torch.cat([state["visual.class_embedding"].expand(1, 1, WIDTH), patches], 1)
        x = norm(x + state["visual.positional_embedding"], "visual.ln_pre")
        image = norm(transformer(x, "visual.", None)[:, 0], "visual.ln_post") @ state["visual.proj"]

        ids = torch.nn.functional.pad(tokens(prompt), (0, 77 - tokens(prompt).shape[1]))
        causal = torch.full((77, 77), -torch.inf).triu(1)
        x = transformer(state["token_embedding.weight"][ids] + state["positional_embedding"], "", causal)
        text = norm(x, "ln_final")[0, ids.argmax()] @ state["text_projection"]
        return torch.nn.functional.cosine_similarity(image, text[None]).item()


def test_hpsv2_checkpoints_are_converted_and_score_as_open_clip_does(tmp_path, pictures):
    state = open_clip_state()
    save_processor(tmp_path)
    torch.save({"state_dict": state}, tmp_path / "HPS_v2_compressed.pt")
    halved = {k: v.half() for k, v in state.items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in halved.items()}}, tmp_path / "HPS_v2.1_compressed.pt")
    c = config("--hpsv2_checkpoints", tmp_path, "--clip_h_processor", tmp_path)
    x = normalised_pixels(pictures)
    for name, weights in (("hpsv2", state), ("hpsv2.1", {k: v.float() for k, v in halved.items()})):
        got = load_scorer(name, c, CPU).score(pictures, PROMPTS)
        by_hand = [100 * open_clip_forward(weights, x[i : i + 1], p) for i, p in enumerate(PROMPTS)]
        assert np.ptp(by_hand) > 0.5
        assert got == pytest.approx(by_hand, abs=2e-3), name
        quick = [100 * open_clip_forward(weights, x[i : i + 1], p, lambda y: y * torch.sigmoid(1.702 * y))
                 for i, p in enumerate(PROMPTS)]  # fmt: skip
        assert np.abs(np.array(got) - quick).max() > 0.05  # the comparison can tell the two activations apart


def test_the_converted_sizes_are_those_of_the_weights():
    model = clip_from_open_clip(open_clip_state())
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (WIDTH, LAYERS, VOCABULARY)
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers) == (SIDE, PATCH, LAYERS)
    assert model.config.projection_dim == DIMENSION and text.hidden_act == vision.hidden_act == "gelu"


# ---------------------------------------------------------------- others


def test_aesthetic_is_a_stack_of_linear_layers_on_the_image_embedding(clip_folder, tmp_path, pictures):
    g = torch.Generator().manual_seed(0)
    sizes = {0: (DIMENSION, 16), 2: (16, 8), 4: (8, 6), 6: (6, 4), 7: (4, 1)}  # the published file's numbering
    layers = {n: (torch.randn(o, i, generator=g), torch.randn(o, generator=g)) for n, (i, o) in sizes.items()}
    state = {f"layers.{n}.{k}": t for n, pair in layers.items() for k, t in zip(("weight", "bias"), pair, strict=True)}
    torch.save(state, tmp_path / "aesthetic.pth")
    c = config("--aesthetic_checkpoint", tmp_path / "aesthetic.pth", "--clip_l_model", clip_folder)
    scorer = load_scorer("aesthetic", c, CPU)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        x = model.visual_projection(model.vision_model(normalised_pixels(pictures)).pooler_output).double()
    x = (x / x.norm(dim=1, keepdim=True)).numpy()
    for weight, bias in layers.values():
        x = x @ weight.double().numpy().T + bias.double().numpy()
    assert scorer.score(pictures, PROMPTS) == pytest.approx(x[:, 0], rel=1e-3)
    assert scorer.score(pictures, PROMPTS[::-1]) == pytest.approx(x[:, 0], rel=1e-3)  # whatever the prompt


def test_the_oracle_is_three_judges():
    rng = np.random.default_rng(0)
    scenes = world.all_scenes()[::90]
    images = [Image.fromarray((world.render(s, rng) * 255).astype(np.uint8)) for s in scenes]
    prompts = [s.prompt() for s in scenes]
    expected = oracle.score(images, prompts)
    for question in oracle.QUESTIONS:
        got = load_scorer(f"oracle_{question}", config(), CPU).score(images, prompts)
        assert np.array_equal(got, expected[question])


ELSEWHERE = ("imagereward", "mps")  # whose weights tests/test_judges.py makes


@pytest.mark.parametrize("name", [n for n in WEIGHT_KEYS if n not in ELSEWHERE])
def test_a_judge_reads_its_own_keys(clip_folder, tmp_path, name):
    """Those by which its scores are told from others'."""
    for file in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save(open_clip_state(), tmp_path / file)
    torch.save({"layers.0.weight": torch.ones(1, DIMENSION), "layers.0.bias": torch.ones(1)}, tmp_path / "head.pth")
    places = {"hpsv2_checkpoints": tmp_path, "aesthetic_checkpoint": tmp_path / "head.pth"}
    places |= dict.fromkeys(("pickscore_model", "clip_h_processor", "clip_l_model"), clip_folder)
    assert places.keys() == {key for judge, keys in WEIGHT_KEYS.items() if judge not in ELSEWHERE for key in keys}
    read: set[str] = set()
    c = config(*(a for item in places.items() for a in (f"--{item[0]}", item[1])), kind=recording(read))
    load_scorer(name, c, CPU)
    assert read & places.keys() == set(WEIGHT_KEYS[name])
    assert c.source_of(name) == " and ".join(str(places[key]) for key in WEIGHT_KEYS[name])


@pytest.mark.parametrize("name", [n for n in WEIGHT_KEYS if n != "imagereward"])
def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path, name):
    keys = {key for judge, keys in WEIGHT_KEYS.items() if judge != "imagereward" for key in keys}
    c = config(*(a for key in keys for a in (f"--{key}", tmp_path)))
    with pytest.raises(UserError) as error:
        load_scorer(name, c, CPU)
    assert str(error.value).startswith(f"scorer '{name}': loading {c.source_of(name)} failed: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hpsv2", "aesthetic"])
def test_a_malicious_pickle_is_not_run(tmp_path, clip_folder, name):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    file = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": Evil()}, file)
    c = config("--hpsv2_checkpoints", tmp_path, "--aesthetic_checkpoint", file, "--clip_l_model", clip_folder)
    with pytest.raises(UserError, match=f"scorer '{name}': loading"):
        load_scorer(name, c, CPU)
    assert not (tmp_path / "pwned").exists()
