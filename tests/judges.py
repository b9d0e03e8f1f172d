"""What small random judges are made of (sizes, a processor, open_clip weights), and what they are given."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pipelines import tokenizer

from evaluation.protocol import EvaluationConfig
from ncp.common.config import parse

SIDE, WIDTH, DIMENSION, HEADS, LAYERS, PATCH, VOCABULARY = 32, 64, 24, 16, 2, 8, 514
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CPU = torch.device("cpu")


def config(*extra: str, kind: type[EvaluationConfig] = EvaluationConfig) -> EvaluationConfig:
    """The evaluation's settings, with `extra`."""
    return parse(kind, ["--pretrained_model_name_or_path", "m", "--prompts", "p", "--output_dir", "o",
                          "--scorers", "clip", *map(str, extra)])  # fmt: skip


def normalised_pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """(N, 3, H, W), as the published judges see pictures of their size."""
    x = torch.stack([torch.from_numpy(np.asarray(p).copy()) for p in pictures]).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def save_processor(folder: Path) -> None:
    tokenizer().save_pretrained(folder)
    preprocessing = {  # the keys of the published files
        "crop_size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": SIDE,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": MEAN, "image_std": STD, "resample": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))


def open_clip_state() -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of open_clip's ViT with its plain text tower."""
    g = torch.Generator().manual_seed(3)

    def random(*shape: int, around: float = 0.0) -> torch.Tensor:
        return around + 0.15 * torch.randn(shape, generator=g)

    state = {
        "logit_scale": torch.tensor(math.log(100.0)), "positional_embedding": random(77, WIDTH),
        "text_projection": random(WIDTH, DIMENSION), "token_embedding.weight": random(VOCABULARY, WIDTH),
        "visual.class_embedding": random(WIDTH), "visual.proj": random(WIDTH, DIMENSION),
        "visual.positional_embedding": random(1 + (SIDE // PATCH) ** 2, WIDTH),
        "visual.conv1.weight": random(WIDTH, 3, PATCH, PATCH),
    }  # fmt: skip
    for norm in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        state |= {f"{norm}.weight": random(WIDTH, around=1), f"{norm}.bias": random(WIDTH)}
    for tower in ("", "visual."):
        for n in range(LAYERS):
            at = f"{tower}transformer.resblocks.{n}."
            for norm in ("ln_1", "ln_2"):
                state |= {f"{at}{norm}.weight": random(WIDTH, around=1), f"{at}{norm}.bias": random(WIDTH)}
            shapes = {"attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,),
                      "attn.out_proj.weight": (WIDTH, WIDTH), "attn.out_proj.bias": (WIDTH,),
                      "mlp.c_fc.weight": (96, WIDTH), "mlp.c_fc.bias": (96,),
                      "mlp.c_proj.weight": (WIDTH, 96), "mlp.c_proj.bias": (WIDTH,)}  # fmt: skip
            state |= {at + name: random(*shape) for name, shape in shapes.items()}
    return state
