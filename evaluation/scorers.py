"""The judges (scorers) behind one interface: images and prompts in, one number per image out.

| scorer | what it computes | scale, as published |
|---|---|---|
| pickscore | exp(logit_scale) x cosine of CLIP-H fine-tuned on Pick-a-Pic | about 15 to 26 |
| hpsv2, hpsv2.1 | 100 x cosine of CLIP-H fine-tuned on HPD v2 | about 20 to 35 (the authors' tables) |
| clip | 100 x max(cosine, 0) of OpenAI's CLIP ViT-L/14 | about 15 to 35 |
| aesthetic | LAION's linear head on the normalised CLIP ViT-L/14 image embedding | 1 to 10 |
| imagereward | ImageReward 1.0, `evaluation/imagereward.py` | about -2.3 to 2.3, standardised |
| mps | exp(logit_scale) x cosine of CLIP-H with cross attention, `evaluation/mps.py` | |
| vqascore, unifiedreward, hpsv3, vlm | a model behind an HTTP endpoint, `evaluation/questions.py` | |
| oracle_* | `tiny/oracle.py`, exact on the embedded world | 0 to 1 |

HPSv2's own `score()` returns the cosine, a hundredth of the values in its authors' tables. Images are square, so the
difference between cropping (CLIP) and padding (HPSv2) does not matter.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.protocol import SCORERS, WEIGHT_KEYS, EvaluationConfig
from evaluation.questions import QUESTIONS
from ncp.common import hub
from ncp.common.errors import UserError

HPS_FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}


@dataclass
class Scorer:
    """`score(images, prompts)`: (N,) numbers for N PIL images (RGB) and N texts; larger is better."""

    name: str
    score: Callable[[list[Any], list[str]], Any]


def check_scorers(config: EvaluationConfig, prompts: list[str]) -> None:
    """Raises UserError for a scorer that is unknown or unavailable, and for prompts that an oracle does not know.

    Loads nothing.
    """
    for name in config.scorers:
        if name not in SCORERS:
            _own_function(name)
        for key in WEIGHT_KEYS.get(name, ()):
            place = getattr(config, key)
            local = place.startswith((".", "/", "~")) or place.count("/") > 1
            if local and not place.startswith("https://") and not Path(place).exists():
                raise UserError(f"scorer '{name}': {key}: no such file or folder: {place}")
        if name == "imagereward" and Path(config.imagereward_model).exists():
            from evaluation.imagereward import imagereward_files

            imagereward_files(config.imagereward_model)
        if name.startswith("oracle_"):
            from tiny import world

            for prompt in prompts:
                try:
                    world.parse(prompt)
                except ValueError as error:
                    raise UserError(f"scorer '{name}' judges the embedded world only: {error}") from None


def check_endpoints(config: EvaluationConfig, names: list[str]) -> None:
    """Raises UserError if the server of one of these scorers does not answer, or does not have the model."""
    if judges := [name for name in names if name in QUESTIONS]:
        from evaluation.endpoint import check_endpoint

        for judge in judges:
            check_endpoint(judge, config)


def load_scorer(name: str, config: EvaluationConfig, device: Any) -> Scorer:
    """The scorer with its weights on `device`, in half precision on a GPU. Raises UserError if loading fails."""
    if name.startswith("oracle_"):
        from tiny import oracle

        return Scorer(name, lambda images, prompts: oracle.score(images, prompts)[name.removeprefix("oracle_")])
    if name in QUESTIONS:
        from evaluation.endpoint import endpoint_scorer

        return Scorer(name, endpoint_scorer(name, config))
    if name not in SCORERS:
        return Scorer(name, _own_function(name))
    try:
        return {
            "pickscore": _pickscore,
            "hpsv2": _hpsv2,
            "hpsv2.1": _hpsv2,
            "clip": _clip_score,
            "aesthetic": _aesthetic,
            "imagereward": _imagereward,
            "mps": _mps,
        }[name](name, config, device)
    except UserError:
        raise
    except Exception as error:  # many kinds: the hub does not answer, a damaged or wrong file
        raise UserError(f"scorer '{name}': loading {config.source_of(name)} failed: {hub.reason(error)}") from None


def _own_function(name: str) -> Callable:
    module, colon, function = name.partition(":")
    if not colon or not re.fullmatch(r"[\w.]+", module):
        raise UserError(
            f"scorer '{name}' is unknown; expected one of: {', '.join(SCORERS)}, or module:function of your own"
        )
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"scorer '{name}': cannot import {module} ({error})") from None
    if not callable(found):
        raise UserError(f"scorer '{name}': {module} has no function '{function}'")
    return found


# ---------------------------------------------------------------- CLIP and models based on it


class Clip:
    """A CLIP model with its tokenizer and image preprocessing. Embeddings are normalised, float32, on the CPU."""

    def __init__(self, model: Any, processor: str, device: Any):
        import torch
        from transformers import CLIPImageProcessorPil, CLIPTokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(processor)
        self.preprocess = CLIPImageProcessorPil.from_pretrained(processor)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.model = model.to(device, dtype).eval().requires_grad_(False)

    def image_embeddings(self, images: list[Any]) -> Any:
        """Embeddings (N, D) of N PIL images."""
        pixels = self.preprocess(images=images, return_tensors="pt")["pixel_values"]
        embedded = self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return _normalised(embedded)

    def text_embeddings(self, prompts: list[str]) -> Any:
        """Embeddings (N, D) of N texts, truncated to the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return _normalised(self.model.get_text_features(**tokens.to(self.model.device)))

    def cosine(self, images: list[Any], prompts: list[str]) -> np.ndarray:
        """Cosines (N,) of each image with its own prompt."""
        return (self.image_embeddings(images) * self.text_embeddings(prompts)).sum(-1).numpy()


def _normalised(output: Any) -> Any:
    import torch

    return torch.nn.functional.normalize(output.pooler_output.float(), dim=-1).cpu()


def _pickscore(name: str, config: EvaluationConfig, device: Any) -> Scorer:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(config.pickscore_model)
    scale = model.logit_scale.float().exp().item()  # before half precision rounds it
    clip = Clip(model, config.clip_h_processor, device)
    return Scorer(name, lambda images, prompts: scale * clip.cosine(images, prompts))


def _clip_score(name: str, config: EvaluationConfig, device: Any) -> Scorer:
    from transformers import CLIPModel

    clip = Clip(CLIPModel.from_pretrained(config.clip_l_model), config.clip_l_model, device)
    return Scorer(name, lambda images, prompts: 100 * np.maximum(clip.cosine(images, prompts), 0))


def _hpsv2(name: str, config: EvaluationConfig, device: Any) -> Scorer:
    import torch

    from evaluation.open_clip import clip_from_open_clip

    file: str | Path = Path(config.hpsv2_checkpoints) / HPS_FILES[name]
    if not Path(config.hpsv2_checkpoints).is_dir():
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(config.hpsv2_checkpoints, HPS_FILES[name])
    state = torch.load(file, map_location="cpu", weights_only=True)
    clip = Clip(clip_from_open_clip(state.get("state_dict", state)), config.clip_h_processor, device)
    return Scorer(name, lambda images, prompts: 100 * clip.cosine(images, prompts))


def _mps(name: str, config: EvaluationConfig, device: Any) -> Scorer:
    from evaluation.mps import mps_file, mps_scorer, read_mps

    model, layers = read_mps(mps_file(config.mps_checkpoint))
    scale = model.logit_scale.float().exp().item()  # before half precision rounds it
    return Scorer(name, mps_scorer(Clip(model, config.clip_h_processor, device), layers, scale))


# ---------------------------------------------------------------- others


def _aesthetic(name: str, config: EvaluationConfig, device: Any) -> Scorer:
    """Linear layers without activations (dropout is off): weights `layers.I.weight`, `layers.I.bias`."""
    import torch
    from transformers import CLIPModel

    place = config.aesthetic_checkpoint
    if place.startswith("https://"):
        state = torch.hub.load_state_dict_from_url(place, map_location="cpu", weights_only=True)
    else:
        state = torch.load(place, map_location="cpu", weights_only=True)
    numbers = sorted(int(key.split(".")[1]) for key in state if key.endswith(".weight"))
    clip = Clip(CLIPModel.from_pretrained(config.clip_l_model), config.clip_l_model, device)

    def score(images: list[Any], prompts: list[str]) -> np.ndarray:
        x = clip.image_embeddings(images)
        for n in numbers:
            x = torch.nn.functional.linear(x, state[f"layers.{n}.weight"].float(), state[f"layers.{n}.bias"].float())
        return x.squeeze(-1).numpy()

    return Scorer(name, score)


def _imagereward(name: str, config: EvaluationConfig, device: Any) -> Scorer:
    from evaluation.imagereward import imagereward_scorer

    return Scorer(name, imagereward_scorer(config.imagereward_model, config.imagereward_tokenizer, device))
