"""Loads HPSv2's weights, which are in open_clip's layout, into transformers' CLIPModel."""

from __future__ import annotations

from typing import Any

import torch

# Names within a layer: open_clip's to transformers'. The fused q, k, v is split.
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_from_open_clip(state: dict[str, torch.Tensor], heads: int = 16) -> Any:
    """A transformers CLIPModel from the state dict of an open_clip ViT with the plain text tower and exact GELU.

    All sizes follow from the weights, except the number of attention heads (ViT-H-14: 16 in both towers).
    """
    from transformers import CLIPConfig, CLIPModel

    state = {key.removeprefix("module."): value.float() for key, value in state.items()}
    vocabulary, text_width = state["token_embedding.weight"].shape
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)

    def tower(prefix: str, width: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": len(state[f"{prefix}resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": sum(k.startswith(prefix) and k.endswith("ln_1.bias") for k in state),
            "num_attention_heads": heads,
            "hidden_act": "gelu",  # not OpenAI's quick_gelu
        }

    text = {
        **tower("transformer.", text_width),
        "vocab_size": vocabulary,
        "max_position_embeddings": len(state["positional_embedding"]),
        # open_clip pools at the largest token id: the end token, which is the last of the vocabulary.
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
        "pad_token_id": 0,
    }
    vision = {**tower("visual.transformer.", vision_width), "patch_size": patch, "image_size": side * patch}
    dimension = state["text_projection"].shape[1]
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimension))
    model.load_state_dict(rename(state), strict=True)
    return model


def rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names and shapes for the tensors of an open_clip state dict."""
    new = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' own spelling
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for old, name in norms.items():
        new |= {f"{name}.{part}": state[f"{old}.{part}"] for part in ("weight", "bias")}
    for key, value in state.items():
        prefix, found, rest = key.partition("transformer.resblocks.")
        if not found:
            continue
        number, _, rest = rest.partition(".")
        layer = f"{'vision' if prefix else 'text'}_model.encoder.layers.{number}"
        if rest.startswith("attn.in_proj_"):
            part = rest.removeprefix("attn.in_proj_")
            for name, third in zip("qkv", value.chunk(3), strict=True):
                new[f"{layer}.self_attn.{name}_proj.{part}"] = third.contiguous()
        else:
            module, _, part = rest.rpartition(".")
            new[f"{layer}.{LAYER[module]}.{part}"] = value
    return new
