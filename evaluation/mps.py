"""MPS, overall preference: a CLIP-H whose image tokens attend to the prompt's words before the comparison with it.

"Learning Multi-dimensional Human Preference for Text-to-Image Generation" (CVPR 2024), trained on MHP, not on
Pick-a-Pic. Names and arithmetic follow `trainer/models/clip_model.py` and `cross_modeling.py` of Kwai-Kolors/MPS. A
single image is scored as in its `eval_overall_mps_on_hpdv2.py`, with that script's threshold of 0.3 (the training code
has 0.01).

A checkpoint is the authors' `MPS_overall_checkpoint.pth`, a pickled module, or its tensors by name in a safetensors or
torch file, with or without the prefix `mps.` of imscore's copy on the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import layer_norm, linear, normalize, scaled_dot_product_attention, silu

# The authors' condition, a list of image properties: words of the prompt that are far from all of these are left out.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.3
CLIP_HEADS = 16  # of both towers of CLIP-H; does not follow from the weights
BASE = 10_000  # of the rotary position embedding

Weights = dict[str, torch.Tensor]


def mps_file(place: str) -> Path:
    """The checkpoint: a file, or model.safetensors in a folder or hub repository."""
    path = Path(place)
    if path.is_file() or path.is_dir():
        return path / "model.safetensors" if path.is_dir() else path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(place, "model.safetensors"))


def read_mps(file: Path) -> tuple[Any, list[Weights]]:
    """(transformers' CLIPModel, weights of each cross-attention layer and of the self-attention layer after it).

    float32 on the CPU. Raises ValueError or KeyError for a file with other content.
    """
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(file)
    else:
        from evaluation.pickled import read_module

        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # a pickled module, or not a torch file: read_module checks which
            state = read_module(file)
    state = {key.removeprefix("mps."): value.float() for key, value in state.items() if torch.is_floating_point(value)}
    clip = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    count = 1 + max((int(k.split(".")[2]) for k in state if k.startswith("cross_model.layers.")), default=-1)
    if not clip or not count:
        raise ValueError("no weights under model. and cross_model.layers.")
    layers = []
    for number in range(count):
        prefixes = (f"cross_model.layers.{number}.0.fn.", f"cross_model.layers.{number}.1.fn.")
        layers += [{k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in prefixes]
    return clip_model(clip), layers


def clip_model(state: Weights) -> Any:
    """A CLIPModel with exact GELU, like LAION's CLIP-H. All sizes but the number of heads follow from the weights."""
    from transformers import CLIPConfig, CLIPModel

    def tower(name: str, width: int) -> dict[str, Any]:
        layers = f"{name}_model.encoder.layers."
        return {
            "hidden_size": width,
            "intermediate_size": len(state[f"{layers}0.mlp.fc1.bias"]),
            "num_hidden_layers": sum(k.startswith(layers) and k.endswith("layer_norm1.bias") for k in state),
            "num_attention_heads": CLIP_HEADS,
            "hidden_act": "gelu",
        }

    dimension, width = state["text_projection.weight"].shape
    vocabulary = len(state["text_model.embeddings.token_embedding.weight"])
    length = len(state["text_model.embeddings.position_embedding.weight"])
    # The end token is the last of the vocabulary, and also the padding. Pooling uses its first occurrence.
    ends = {"eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2, "pad_token_id": vocabulary - 1}
    text = {**tower("text", width), **ends, "vocab_size": vocabulary, "max_position_embeddings": length}
    channels, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    side = round((len(state["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5) * patch
    vision = {**tower("vision", channels), "patch_size": patch, "image_size": side}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimension))
    model.load_state_dict(state, strict=True)
    return model


def mps_scorer(clip: Any, layers: list[Weights], scale: float) -> Callable[[list[Any], list[str]], Any]:
    """MPS as a function of N PIL images and N prompts: (N,) float32.

    clip: has `model` (on its device, in its precision), `tokenizer` and `preprocess`. scale: factor of the cosine.
    """
    model = clip.model
    layers = [{name: w.to(model.device, model.dtype) for name, w in layer.items()} for layer in layers]

    def read(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of all tokens including padding (N, 77, D), and of the first end token (N, D)."""
        length = model.config.text_config.max_position_embeddings
        ids = clip.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        out = model.text_model(input_ids=ids["input_ids"].to(model.device))
        return model.text_projection(out.last_hidden_state), model.text_projection(out.pooler_output)

    condition, _ = read([CONDITION])

    @torch.no_grad()
    def score(images: list[Any], prompts: list[str]) -> Any:
        words, prompt = read(prompts)
        pixels = clip.preprocess(images=images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        x = model.visual_projection(model.vision_model(pixel_values=pixels).last_hidden_state)
        counted = words_that_count(words, condition)
        for attend_to_words, attend_to_image in zip(layers[::2], layers[1::2], strict=True):
            x = x + cross_attention(x, words, counted, attend_to_words)
            x = x + self_attention(x, attend_to_image, attend_to_words["to_kv.weight"].shape[0] // 2)
        cosine = (normalize(x[:, 0].float(), dim=-1) * normalize(prompt.float(), dim=-1)).sum(-1)
        return (scale * cosine).cpu().numpy()

    return score


def words_that_count(words: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """(N, L) bool: tokens of a prompt whose similarity to the condition's nearest token is above the threshold.

    words: (N, L, D); condition: (1, M, D). Similarities are relative to the largest one in the prompt.
    """
    near = (words @ condition.mT).amax(-1)  # (N, L)
    return near / near.amax(-1, keepdim=True) > THRESHOLD


def cross_attention(x: torch.Tensor, words: torch.Tensor, counted: torch.Tensor, w: Weights) -> torch.Tensor:
    """(N, T, D): each image token attends to the counted words, in parallel with a feed-forward layer.

    x: (N, T, D); words: (N, L, D); counted: (N, L). There is one head of keys and values.
    """
    x = layer_norm(x, x.shape[-1:], w["norm.weight"])
    k, v = linear(words, w["to_kv.weight"]).chunk(2, -1)
    attended = attention(linear(x, w["to_q.weight"]), k, v, counted)
    return linear(attended, w["to_out.weight"]) + linear(gated(linear(x, w["ff.0.weight"])), w["ff.2.weight"])


def self_attention(x: torch.Tensor, w: Weights, channels: int) -> torch.Tensor:
    """(N, T, D): each image token attends to all, with rotary positions, in parallel with a feed-forward layer.

    channels: of a head. One matrix holds the queries, the one head of keys, that of values, and the feed-forward layer.
    """
    x = layer_norm(x, x.shape[-1:], w["norm.weight"])
    queries, inner = w["attn_out.weight"].shape[1], w["ff_out.1.weight"].shape[1]
    q, k, v, ff = linear(x, w["fused_attn_ff_proj.weight"]).split((queries, channels, channels, 2 * inner), -1)
    attended = attention(rotated(q, channels), rotated(k, channels), v, None)
    return linear(attended, w["attn_out.weight"]) + linear(gated(ff), w["ff_out.1.weight"])


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """(N, T, H C): attention of queries (N, T, H C) to one head of keys and values (N, L, C), scaled by 1 / sqrt(C)."""
    heads = q.shape[-1] // k.shape[-1]
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)  # (N, H, T, C)
    k, v = (t[:, None].expand(-1, heads, -1, -1) for t in (k, v))
    mask = None if counted is None else counted[:, None, None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def rotated(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Rotary positions along dimension 1 of (N, T, H C): channel c is rotated with channel c + C / 2 of its head."""
    exponent = torch.arange(0, channels, 2, device=x.device, dtype=torch.float32) / channels
    angle = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None] / BASE**exponent  # (T, C / 2)
    cos, sin = (f(angle)[None, :, None].to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x.unflatten(-1, (-1, channels)).chunk(2, -1)  # each (N, T, H, C / 2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).flatten(2)


def gated(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU: the first half of the channels times silu of the second."""
    value, gate = x.chunk(2, -1)
    return value * silu(gate)
