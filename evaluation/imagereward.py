"""ImageReward 1.0 in transformers' BLIP classes: image encoder, text encoder that attends to it, and a linear head.

Its own package cannot be imported with current transformers. Names, preprocessing and standardisation follow
`ImageReward/ImageReward.py`, `models/BLIP/blip.py` and `models/BLIP/med.py` in THUDM/ImageReward, and BLIP's
`models/vit.py` in salesforce/BLIP. The checkpoint's keys begin with `blip.visual_encoder.` (timm's names),
`blip.text_encoder.` (BERT's, with `crossattention` in each layer) and `mlp.layers.`; its `blip.vision_proj` and
`blip.text_proj` belong to BLIP's pre-training and are not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from ncp.common.errors import UserError

FILES = ("ImageReward.pt", "med_config.json")
PUBLISHED = {"ImageReward-v1.0": "zai-org/ImageReward"}  # name in the package: repository on the hub
MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35  # tokens of a prompt, padded or truncated
HEAD = (0, 2, 4, 6, 7)  # numbers of the linear layers; only dropout between them
HEAD_WIDTH = 64  # channels of an attention head of BLIP's image encoders, base and large

# Names in timm's image encoder to names in transformers' BlipVisionModel. Within a block the last two parts count.
OUTSIDE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
INSIDE = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def imagereward_files(place: str) -> tuple[Path, Path]:
    """Paths of checkpoint and text encoder's config: in a folder, beside a checkpoint, or on the hub.

    Raises UserError if they cannot be found.
    """
    path = Path(place)
    if path.is_file():
        files = path, path.with_name(FILES[1])
    elif path.is_dir():
        files = path / FILES[0], path / FILES[1]
    else:
        from huggingface_hub import hf_hub_download

        checkpoint, config = (Path(hf_hub_download(PUBLISHED.get(place, place), name)) for name in FILES)
        return checkpoint, config
    for file in files:
        if not file.is_file():
            raise UserError(f"scorer 'imagereward': imagereward_model: no such file: {file}")
    return files


def imagereward_scorer(place: str, tokenizer_name: str, device: Any) -> Callable[[list[Any], list[str]], Any]:
    """ImageReward as a function of N PIL images and N prompts: (N,) float32, standardised. Runs in float32."""
    from transformers import BertTokenizer, CLIPImageProcessorPil

    checkpoint, med_config = imagereward_files(place)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = {key: value.float() for key, value in state.items() if torch.is_floating_point(value)}
    image_encoder = blip_image_encoder(part(state, "blip.visual_encoder.")).to(device)
    config = json.loads(med_config.read_text(encoding="utf-8"))
    text_encoder = blip_text_encoder(part(state, "blip.text_encoder."), config).to(device)
    head = [(state[f"mlp.layers.{n}.weight"].to(device), state[f"mlp.layers.{n}.bias"].to(device)) for n in HEAD]
    tokenizer = BertTokenizer.from_pretrained(tokenizer_name)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # as BLIP: matters for a prompt that contains them
    side = image_encoder.config.image_size
    # The defaults are CLIP's: bicubic, shorter side to `side`, centre crop, CLIP's mean and standard deviation.
    preprocess = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @torch.no_grad()
    def score(images: list[Any], prompts: list[str]) -> Any:
        pixels = preprocess(images=images, return_tensors="pt")["pixel_values"].to(device)
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        x = text_encoder(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            encoder_hidden_states=image_encoder(pixel_values=pixels).last_hidden_state,
        ).last_hidden_state[:, 0]
        for weight, bias in head:
            x = linear(x, weight, bias)
        return ((x.squeeze(-1) - MEAN) / STD).cpu().numpy()

    return score


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, which is removed from their names. Raises ValueError if there are none."""
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not found:
        raise ValueError(f"no weights under {prefix}")
    return found


def blip_image_encoder(state: dict[str, torch.Tensor]) -> Any:
    """A BlipVisionModel from the weights of timm's ViT. All sizes follow from the weights."""
    from transformers import BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # as in vit.py; transformers' default differs
    )
    model = BlipVisionModel(config)
    model.load_state_dict({rename(key): value for key, value in state.items()}, strict=True)
    return model.eval().requires_grad_(False)


def rename(key: str) -> str:
    """transformers' name for a tensor of timm's ViT. Raises KeyError for an unknown name."""
    if key in OUTSIDE:
        return OUTSIDE[key]
    module, _, kind = key.rpartition(".")
    if module.startswith("blocks."):
        _, number, name = module.split(".", 2)
        return f"encoder.layers.{number}.{INSIDE[name]}.{kind}"
    return f"{OUTSIDE[module]}.{kind}"


def blip_text_encoder(state: dict[str, torch.Tensor], med_config: dict[str, Any]) -> Any:
    """A BlipTextModel without pooling from the weights of BLIP's BERT, with the config of `med_config.json`.

    The width of the image features follows from the weights: the config's value, 768, is that of the smaller image
    encoder.
    """
    from transformers import BlipTextConfig, BlipTextModel

    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "max_position_embeddings", "layer_norm_eps", "vocab_size", "pad_token_id")  # fmt: skip
    seen = state["encoder.layer.0.crossattention.self.key.weight"].shape[1]
    config = BlipTextConfig(
        **{key: med_config[key] for key in keys},
        encoder_hidden_size=seen,
        is_decoder=True,  # for the cross attention; causal masking is set by each call, off by default
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)
