"""ImageReward and MPS against forward passes written from their definitions, on small weights under published names.

Nothing of transformers is used on the other side: attention is torch's own, or loops over heads.
"""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import recording
from judges import CPU, MEAN, STD, config, normalised_pixels, save_processor
from PIL import Image
from pipelines import tokenizer
from safetensors.torch import save_file

from evaluation import imagereward, mps
from evaluation.imagereward import imagereward_scorer
from evaluation.mps import CONDITION
from evaluation.pickled import read_module
from evaluation.protocol import WEIGHT_KEYS
from evaluation.scorers import check_scorers, load_scorer
from ncp.common.errors import UserError

SIDE, PATCH = 32, 8
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs", "red", ",", "and", "##s", "x"]
PROMPTS = ["a red cat", "Two dogs, and a cat", " ".join(["two red dogs"] * 20), "cats [ENC]"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def random_state(shapes: dict[str, tuple[int, ...]], seed: int, spread: float = 0.15) -> dict[str, torch.Tensor]:
    """Random tensors; those of norms around one."""
    g = torch.Generator().manual_seed(seed)
    state = {name: spread * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {n: v + 1 if "norm" in n.lower() and n.endswith(("weight", "gamma")) else v for n, v in state.items()}


# ---------------------------------------------------------------- ImageReward

VIT, DEPTH, VIT_INNER = 128, 2, 96  # two heads of 64 channels
TEXT, TEXT_LAYERS, TEXT_HEADS, TEXT_INNER = 48, 3, 4, 80
MED = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": TEXT, "initializer_range": 0.02, "intermediate_size": TEXT_INNER,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 64, "model_type": "bert", "num_attention_heads": TEXT_HEADS,
    "num_hidden_layers": TEXT_LAYERS, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": len(WORDS) + 2,
    "encoder_width": 768, "add_cross_attention": True,
}  # fmt: skip


def imagereward_state() -> dict[str, torch.Tensor]:
    """The keys of ImageReward.pt, the unused ones included."""

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        v + "cls_token": (1, 1, VIT), v + "pos_embed": (1, 1 + (SIDE // PATCH) ** 2, VIT),
        v + "patch_embed.proj.weight": (VIT, 3, PATCH, PATCH), v + "patch_embed.proj.bias": (VIT,),
        t + "embeddings.word_embeddings.weight": (MED["vocab_size"], TEXT),
        t + "embeddings.position_embeddings.weight": (MED["max_position_embeddings"], TEXT),
        **norm(v + "norm", VIT), **norm(t + "embeddings.LayerNorm", TEXT),
        **linear("blip.vision_proj", 8, VIT), **linear("blip.text_proj", 8, TEXT),
    }  # fmt: skip
    for n in range(DEPTH):
        block = f"{v}blocks.{n}."
        shapes |= norm(block + "norm1", VIT) | norm(block + "norm2", VIT)
        shapes |= linear(block + "attn.qkv", 3 * VIT, VIT) | linear(block + "attn.proj", VIT, VIT)
        shapes |= linear(block + "mlp.fc1", VIT_INNER, VIT) | linear(block + "mlp.fc2", VIT, VIT_INNER)
    for n in range(TEXT_LAYERS):
        layer = f"{t}encoder.layer.{n}."
        for kind, seen in (("attention", TEXT), ("crossattention", VIT)):
            shapes |= linear(f"{layer}{kind}.self.query", TEXT, TEXT)
            shapes |= linear(f"{layer}{kind}.self.key", TEXT, seen) | linear(f"{layer}{kind}.self.value", TEXT, seen)
            shapes |= linear(f"{layer}{kind}.output.dense", TEXT, TEXT)
            shapes |= norm(f"{layer}{kind}.output.LayerNorm", TEXT)
        shapes |= linear(layer + "intermediate.dense", TEXT_INNER, TEXT)
        shapes |= linear(layer + "output.dense", TEXT, TEXT_INNER) | norm(layer + "output.LayerNorm", TEXT)
    for n, (out, into) in {0: (24, TEXT), 2: (16, 24), 4: (8, 16), 6: (4, 8), 7: (1, 4)}.items():
        shapes |= linear(f"mlp.layers.{n}", out, into)
    state = random_state(shapes, seed=1)
    state |= {k: 3 * x for k, x in state.items() if k.startswith("mlp.")}
    return {**state, t + "embeddings.position_ids": torch.arange(MED["max_position_embeddings"])[None]}


def tokens_by_hand(prompt: str) -> list[int]:
    """[CLS], words without capitals, [SEP]: 35 of them. A word that ends in an unknown s is two."""
    ids = []
    for word in prompt.replace(",", " , ").split():
        if word == "[ENC]":
            ids.append(len(WORDS) + 1)  # the second of the added tokens
        elif word.lower() in WORDS:
            ids.append(WORDS.index(word.lower()))
        else:
            ids += [WORDS.index(word.lower()[:-1]), WORDS.index("##s")]
    ids = [2, *ids[:33], 3]
    return ids + [0] * (35 - len(ids))


def imagereward_by_hand(state: dict[str, torch.Tensor], pixels: torch.Tensor, prompt: str) -> float:
    """One image (1, 3, SIDE, SIDE) and one prompt, in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}
    functional = torch.nn.functional

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name, eps):
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    # timm's ViT: fused q, k, v in the order that torch's MultiheadAttention has them, pre-norm, a norm at the end
    v = "blip.visual_encoder."
    x = functional.conv2d(pixels.double(), w[v + "patch_embed.proj.weight"], w[v + "patch_embed.proj.bias"], PATCH)
    x = torch.cat([w[v + "cls_token"], x.flatten(2).mT], 1) + w[v + "pos_embed"]
    for n in range(DEPTH):
        block = f"{v}blocks.{n}."
        attention = torch.nn.MultiheadAttention(VIT, VIT // 64, batch_first=True).double()
        names = {"in_proj_weight": "attn.qkv.weight", "in_proj_bias": "attn.qkv.bias",
                 "out_proj.weight": "attn.proj.weight", "out_proj.bias": "attn.proj.bias"}  # fmt: skip
        attention.load_state_dict({k: w[block + name] for k, name in names.items()})
        y = norm(x, block + "norm1", 1e-6)
        x = x + attention(y, y, y, need_weights=False)[0]
        y = linear(norm(x, block + "norm2", 1e-6), block + "mlp.fc1")
        x = x + linear(functional.gelu(y), block + "mlp.fc2")
    image = norm(x, v + "norm", 1e-6)[0]  # (17, VIT)

    # BERT: post-norm; in each layer words attend to words, then to the image. Padding is not attended to.
    t, ids = "blip.text_encoder.", torch.tensor(tokens_by_hand(prompt))
    x = w[t + "embeddings.word_embeddings.weight"][ids] + w[t + "embeddings.position_embeddings.weight"][:35]
    x = norm(x, t + "embeddings.LayerNorm", 1e-12)

    def attend(x, seen, name, allowed):
        q, k, u = (linear(a, f"{name}.self.{p}") for a, p in ((x, "query"), (seen, "key"), (seen, "value")))
        size, heads = TEXT // TEXT_HEADS, []
        for h in range(TEXT_HEADS):
            c = slice(h * size, (h + 1) * size)
            logits = q[:, c] @ k[:, c].T / math.sqrt(size) + torch.where(allowed, 0.0, -10000.0)
            heads.append(logits.softmax(-1) @ u[:, c])
        return norm(linear(torch.cat(heads, -1), f"{name}.output.dense") + x, f"{name}.output.LayerNorm", 1e-12)

    for n in range(TEXT_LAYERS):
        layer = f"{t}encoder.layer.{n}."
        x = attend(x, x, layer + "attention", ids != 0)
        x = attend(x, image, layer + "crossattention", torch.ones(len(image), dtype=torch.bool))
        y = functional.gelu(linear(x, layer + "intermediate.dense"))
        x = norm(linear(y, layer + "output.dense") + x, layer + "output.LayerNorm", 1e-12)
    y = x[0]
    for n in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{n}")
    return ((y.item()) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def imagereward_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(imagereward_state(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    return folder


def imagereward_config(folder: Path, model: Path | None = None):
    return config("--scorers", "imagereward", "--imagereward_model", model or folder,
                  "--imagereward_tokenizer", folder)  # fmt: skip


def test_imagereward_scores_as_its_own_forward_pass_does(imagereward_folder, pictures):
    c = imagereward_config(imagereward_folder)
    check_scorers(c, PROMPTS)
    got = load_scorer("imagereward", c, CPU).score(pictures, PROMPTS)
    x = normalised_pixels(pictures)
    state = imagereward_state()
    by_hand = [imagereward_by_hand(state, x[i : i + 1], p) for i, p in enumerate(PROMPTS)]
    assert np.ptp(by_hand) > 0.05
    assert got == pytest.approx(by_hand, abs=1e-4)
    # Each part matters: another prompt, another image, another order of the head's layers would show.
    assert abs(imagereward_by_hand(state, x[:1], PROMPTS[1]) - by_hand[0]) > 0.01
    assert abs(imagereward_by_hand(state, x[1:2], PROMPTS[0]) - by_hand[0]) > 0.01
    alone = load_scorer("imagereward", c, CPU).score(pictures[1:2], PROMPTS[1:2])
    assert alone == pytest.approx(got[1:2], abs=1e-5)  # whatever is scored beside it


def test_imagereward_preprocesses_as_it_was_published(imagereward_folder):
    """The shorter side to SIDE by Pillow's bicubic filter, the middle, CLIP's mean and deviation."""
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    score = load_scorer("imagereward", imagereward_config(imagereward_folder), CPU).score
    resized = wide.resize((int(SIDE * 90 / 40), SIDE), Image.Resampling.BICUBIC)
    left = round((resized.width - SIDE) / 2)
    middle = resized.crop((left, 0, left + SIDE, SIDE))
    x = torch.from_numpy(np.asarray(middle).copy()).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert score([wide], ["a cat"])[0] == pytest.approx(imagereward_by_hand(imagereward_state(), x, "a cat"), abs=1e-4)


def test_imagereward_is_found_as_a_file_a_folder_or_on_the_hub(imagereward_folder, pictures, monkeypatch):
    expected = load_scorer("imagereward", imagereward_config(imagereward_folder), CPU).score(pictures, PROMPTS)
    c = imagereward_config(imagereward_folder, imagereward_folder / "ImageReward.pt")
    assert load_scorer("imagereward", c, CPU).score(pictures, PROMPTS) == pytest.approx(expected)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download",
                        lambda repo, file: asked.append((repo, file)) or imagereward_folder / file)  # fmt: skip
    for place in ("zai-org/ImageReward", "ImageReward-v1.0"):  # the second as older configs have it
        score = imagereward_scorer(place, str(imagereward_folder), CPU)
        assert score(pictures, PROMPTS) == pytest.approx(expected)
    assert asked == [("zai-org/ImageReward", f) for f in imagereward.FILES] * 2


@pytest.mark.parametrize("damage", ["no config", "no text encoder", "a strange layer", "damaged"])
def test_an_imagereward_of_other_content_is_one_line(imagereward_folder, tmp_path, damage):
    state = imagereward_state()
    if damage == "no text encoder":
        state = {k: v for k, v in state.items() if "text_encoder" not in k}
    if damage == "a strange layer":
        state["blip.visual_encoder.blocks.0.adapter.weight"] = torch.ones(2)
    torch.save(state, tmp_path / "ImageReward.pt")
    if damage == "damaged":
        (tmp_path / "ImageReward.pt").write_bytes((tmp_path / "ImageReward.pt").read_bytes()[:1000])
    if damage != "no config":
        (tmp_path / "med_config.json").write_text(json.dumps(MED))
    c = imagereward_config(imagereward_folder, tmp_path)
    with pytest.raises(UserError) as error:
        check_scorers(c, PROMPTS)
        load_scorer("imagereward", c, CPU)
    assert str(error.value).startswith("scorer 'imagereward': ") and "\n" not in str(error.value)
    if damage == "no config":  # before anything is loaded
        assert f"no such file: {tmp_path}/med_config.json" in str(error.value)


# ---------------------------------------------------------------- MPS

WIDTH, DIMENSION, CHANNELS, HEADS, INNER, LAYERS = 64, 24, 8, 3, 40, 2  # CHANNELS and HEADS of the cross attention
MPS_PROMPTS = ["a cat", "a much longer prompt about two dogs, one red and one very blue", "x", "light, color"]


def mps_state() -> dict[str, torch.Tensor]:
    """The keys of the model, which is in two parts: `model`, transformers' CLIPModel, and `cross_model`."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.logit_scale": (), "model.text_projection.weight": (DIMENSION, WIDTH),
        "model.visual_projection.weight": (DIMENSION, WIDTH),
        "model.text_model.embeddings.token_embedding.weight": (514, WIDTH),
        "model.text_model.embeddings.position_embedding.weight": (77, WIDTH),
        "model.vision_model.embeddings.class_embedding": (WIDTH,),
        "model.vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "model.vision_model.embeddings.position_embedding.weight": (1 + (SIDE // PATCH) ** 2, WIDTH),
    }  # fmt: skip
    norms = ["text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for tower in ("text", "vision"):
        for n in range(2):
            at = f"{tower}_model.encoder.layers.{n}."
            norms += [at + "layer_norm1", at + "layer_norm2"]
            for name, out, into in (("self_attn.q_proj", WIDTH, WIDTH), ("self_attn.k_proj", WIDTH, WIDTH),
                                    ("self_attn.v_proj", WIDTH, WIDTH), ("self_attn.out_proj", WIDTH, WIDTH),
                                    ("mlp.fc1", 96, WIDTH), ("mlp.fc2", WIDTH, 96)):  # fmt: skip
                shapes |= {f"model.{at}{name}.weight": (out, into), f"model.{at}{name}.bias": (out,)}
    shapes |= {f"model.{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")}
    for n in range(LAYERS):
        cross, own = f"cross_model.layers.{n}.0.fn.", f"cross_model.layers.{n}.1.fn."
        shapes |= {
            cross + "norm.weight": (DIMENSION,), cross + "to_q.weight": (HEADS * CHANNELS, DIMENSION),
            cross + "to_kv.weight": (2 * CHANNELS, DIMENSION), cross + "to_out.weight": (DIMENSION, HEADS * CHANNELS),
            cross + "ff.0.weight": (2 * INNER, DIMENSION), cross + "ff.2.weight": (DIMENSION, INNER),
            own + "norm.weight": (DIMENSION,),
            own + "fused_attn_ff_proj.weight": (HEADS * CHANNELS + 2 * CHANNELS + 2 * INNER, DIMENSION),
            own + "attn_out.weight": (DIMENSION, HEADS * CHANNELS), own + "ff_out.1.weight": (DIMENSION, INNER),
        }  # fmt: skip
    state = random_state(shapes, seed=2, spread=0.2)
    state["model.logit_scale"] = torch.tensor(math.log(20.0))
    # Words that differ, so that some are far from what counts in an image.
    state["model.text_model.embeddings.token_embedding.weight"] *= 10
    state["model.text_model.final_layer_norm.bias"] *= 0
    return state


def mps_by_hand(
    state: dict[str, torch.Tensor], pixels: torch.Tensor, prompt: str, threshold: float = 0.3
) -> tuple[float, int]:
    """(score, number of tokens that the image attends to) of one image and one prompt, in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}
    functional = torch.nn.functional

    def norm(x, name, bias=True):
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"] if bias else None, 1e-5)

    def tower(x, name, mask):
        for n in range(2):
            at = f"model.{name}_model.encoder.layers.{n}."
            attention = torch.nn.MultiheadAttention(WIDTH, 16, batch_first=True).double()
            weights, biases = ([w[f"{at}self_attn.{p}_proj.{kind}"] for p in "qkv"] for kind in ("weight", "bias"))
            attention.load_state_dict({
                "in_proj_weight": torch.cat(weights), "in_proj_bias": torch.cat(biases),
                "out_proj.weight": w[at + "self_attn.out_proj.weight"],
                "out_proj.bias": w[at + "self_attn.out_proj.bias"],
            })  # fmt: skip
            y = norm(x, at + "layer_norm1")
            x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = norm(x, at + "layer_norm2") @ w[at + "mlp.fc1.weight"].T + w[at + "mlp.fc1.bias"]
            x = x + functional.gelu(y) @ w[at + "mlp.fc2.weight"].T + w[at + "mlp.fc2.bias"]
        return x

    def read(text):
        ids = tokenizer()(text, truncation=True)["input_ids"]
        ids = torch.tensor(ids + [513] * (77 - len(ids)))  # padded with the end token
        x = w["model.text_model.embeddings.token_embedding.weight"][ids]
        x = x + w["model.text_model.embeddings.position_embedding.weight"]
        x = tower(x[None], "text", torch.full((77, 77), -torch.inf, dtype=torch.float64).triu(1))[0]
        x = norm(x, "model.text_model.final_layer_norm") @ w["model.text_projection.weight"].T
        return x, x[ids.tolist().index(513)]

    words, pooled = read(prompt)
    condition, _ = read(CONDITION)
    near = torch.stack([max(word @ c for c in condition) for word in words])
    allowed = near / near.max() > threshold

    patches = functional.conv2d(pixels.double(), w["model.vision_model.embeddings.patch_embedding.weight"], None, PATCH)
    x = torch.cat([w["model.vision_model.embeddings.class_embedding"].expand(1, 1, WIDTH), patches.flatten(2).mT], 1)
    x = x + w["model.vision_model.embeddings.position_embedding.weight"]
    x = tower(norm(x, "model.vision_model.pre_layrnorm"), "vision", None)[0]  # before the last norm
    x = x @ w["model.visual_projection.weight"].T

    def gated(y):
        return y[:, :INNER] * functional.silu(y[:, INNER:])

    def turned(y):
        """Channels c and c + CHANNELS / 2 at position p as a complex number, times exp(i p / 10000^(2c / CHANNELS))."""
        half = CHANNELS // 2
        c, p = torch.arange(half), torch.arange(len(y))[:, None]
        z = torch.complex(y[:, :half], y[:, half:]) * torch.exp(1j * p / 10000 ** (2 * c / CHANNELS)).to(torch.cdouble)
        return torch.cat([z.real, z.imag], -1)

    for n in range(LAYERS):
        at = f"cross_model.layers.{n}.0.fn."
        y = norm(x, at + "norm", bias=False)
        q, kv = y @ w[at + "to_q.weight"].T, words @ w[at + "to_kv.weight"].T
        heads = []
        for h in range(HEADS):
            logits = q[:, h * CHANNELS : (h + 1) * CHANNELS] @ kv[:, :CHANNELS].T / math.sqrt(CHANNELS)
            heads.append(logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ kv[:, CHANNELS:])
        feed = gated(y @ w[at + "ff.0.weight"].T) @ w[at + "ff.2.weight"].T
        x = x + torch.cat(heads, -1) @ w[at + "to_out.weight"].T + feed

        at = f"cross_model.layers.{n}.1.fn."
        fused = norm(x, at + "norm", bias=False) @ w[at + "fused_attn_ff_proj.weight"].T
        k, v = fused[:, HEADS * CHANNELS :][:, :CHANNELS], fused[:, HEADS * CHANNELS :][:, CHANNELS : 2 * CHANNELS]
        heads = [
            (turned(fused[:, h * CHANNELS : (h + 1) * CHANNELS]) @ turned(k).T / math.sqrt(CHANNELS)).softmax(-1) @ v
            for h in range(HEADS)
        ]
        feed = gated(fused[:, -2 * INNER :]) @ w[at + "ff_out.1.weight"].T
        x = x + torch.cat(heads, -1) @ w[at + "attn_out.weight"].T + feed
    cosine = functional.cosine_similarity(x[0], pooled, dim=0)
    return (w["model.logit_scale"].exp() * cosine).item(), int(allowed.sum())


def mps_config(file: Path, processor: Path):
    return config("--scorers", "mps", "--mps_checkpoint", file, "--clip_h_processor", processor)


@pytest.fixture(scope="module")
def mps_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mps")
    save_processor(folder)
    # As the tensors of a module that was saved by transformers of 2023, with what it keeps beside parameters.
    buffers = {
        "model.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "cross_model.layers.0.0.fn.norm.bias": torch.zeros(DIMENSION),
        "cross_model.layers.0.1.fn.rotary_emb.inv_freq": torch.ones(CHANNELS // 2),
    }
    torch.save({**mps_state(), **buffers}, folder / "mps.pt")
    save_file({f"mps.{k}": v for k, v in mps_state().items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_mps_scores_as_its_own_forward_pass_does(mps_folder, pictures, monkeypatch, threshold):
    """With the published threshold, and with one by which most tokens of these small weights are left out."""
    assert mps.THRESHOLD == 0.3
    monkeypatch.setattr(mps, "THRESHOLD", threshold)
    x = normalised_pixels(pictures)
    by_hand = [mps_by_hand(mps_state(), x[i : i + 1], p, threshold) for i, p in enumerate(MPS_PROMPTS)]
    assert np.ptp([score for score, _ in by_hand]) > 0.5
    counts = [count for _, count in by_hand]
    assert max(counts) < 20 if threshold == 0.7 else 60 < min(counts) < 77
    for place in (mps_folder / "mps.pt", mps_folder / "model.safetensors", mps_folder):
        got = load_scorer("mps", mps_config(place, mps_folder), CPU).score(pictures, MPS_PROMPTS)
        assert got == pytest.approx([score for score, _ in by_hand], abs=1e-4)


def module_of(state: dict[str, torch.Tensor], kind: type[torch.nn.Module]) -> torch.nn.Module:
    """Nested modules with these parameters, and with what a module of transformers has beside them."""
    root = kind()
    for name, value in state.items():
        *path, last = name.split(".")
        at = root
        for step in path:
            if step not in at._modules:
                at.add_module(step, kind())
            at = at._modules[step]
        at.register_parameter(last, torch.nn.Parameter(value))
    root.register_buffer("position_ids", torch.arange(3), persistent=False)
    return root


def test_the_authors_pickled_module_is_read_without_their_code(mps_folder, tmp_path, pictures, monkeypatch):
    module = types.ModuleType("trainer_of_the_authors")
    source = (
        "import torch\n"
        "class Config(dict):\n    def __init__(self):\n        self.names = {'a', 'b'}\n        self['x'] = [1]\n"
        "class Part(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.config = Config()\n        self.kind = torch.float16\n"
    )
    exec(source, module.__dict__)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "trainer_of_the_authors", module)
        halved = {name: value.half() for name, value in mps_state().items()}
        torch.save(module_of(halved, module.Part), tmp_path / "MPS_overall_checkpoint.pth")
    assert "trainer_of_the_authors" not in sys.modules
    read = read_module(tmp_path / "MPS_overall_checkpoint.pth")
    assert read.keys() == halved.keys() and all(torch.equal(read[k], halved[k]) for k in read)
    got = load_scorer("mps", mps_config(tmp_path / "MPS_overall_checkpoint.pth", mps_folder), CPU)
    x, rounded = normalised_pixels(pictures), {k: v.float() for k, v in halved.items()}
    by_hand = [mps_by_hand(rounded, x[i : i + 1], p)[0] for i, p in enumerate(MPS_PROMPTS)]
    assert got.score(pictures, MPS_PROMPTS) == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("name", ["imagereward", "mps"])
def test_a_judge_reads_its_own_keys(mps_folder, imagereward_folder, name):
    """Those by which its scores are told from others'."""
    places = {"imagereward_model": imagereward_folder, "imagereward_tokenizer": imagereward_folder,
              "mps_checkpoint": mps_folder / "mps.pt", "clip_h_processor": mps_folder}  # fmt: skip
    read: set[str] = set()
    c = config(*(a for item in places.items() for a in (f"--{item[0]}", item[1])), kind=recording(read))
    load_scorer(name, c, CPU)
    assert read & places.keys() == set(WEIGHT_KEYS[name])
    assert c.source_of(name) == " and ".join(str(places[key]) for key in WEIGHT_KEYS[name])


class Evil:
    """Unpickled as usual, it makes a folder."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("scorer", ["mps", "imagereward"])
def test_a_malicious_pickle_is_not_run(mps_folder, imagereward_folder, tmp_path, scorer):
    module = torch.nn.Linear(2, 2)
    module.extra = Evil(tmp_path / "pwned")
    torch.save(module, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    place = tmp_path / "ImageReward.pt"
    c = mps_config(place, mps_folder) if scorer == "mps" else imagereward_config(imagereward_folder, place)
    with pytest.raises(UserError, match=f"scorer '{scorer}': loading"):
        load_scorer(scorer, c, CPU)
    assert not (tmp_path / "pwned").exists()
    torch.load(place, weights_only=False)  # it would
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [{"a": torch.ones(1)}, [1, 2], None])
def test_an_mps_of_other_content_is_one_line(mps_folder, tmp_path, content):
    file = tmp_path / "mps.pth"
    torch.save(content, file) if content is not None else file.write_bytes(b"no weights")
    with pytest.raises(UserError) as error:
        load_scorer("mps", mps_config(file, mps_folder), CPU)
    assert str(error.value).startswith(f"scorer 'mps': loading {file}") and "\n" not in str(error.value)
