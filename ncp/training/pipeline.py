"""What a diffusers pipeline folder (or hub repository) says of itself, read and checked without loading a weight."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ncp.common import hub
from ncp.common.errors import UserError
from ncp.common.files import sampled_sha256
from ncp.ddpm import PREDICTION_TYPES, VARIANCE_TYPES
from ncp.encoder import normalize_block
from ncp.training.settings import TrainingConfig

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIPELINES = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}


@dataclass
class Description:
    """What a pipeline folder says of itself: component configs, read without loading a weight."""

    pipeline: Any  # its class
    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoders: list[dict[str, Any]]

    @property
    def is_xl(self) -> bool:
        return self.pipeline is StableDiffusionXLPipeline

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        side = resolution // 2 ** (len(self.vae["block_out_channels"]) - 1)
        return self.unet["in_channels"], side, side

    @property
    def text_shape(self) -> tuple[int, int]:
        """(tokens, dimensions) of a prompt's embedding."""
        return self.text_encoders[0]["max_position_embeddings"], sum(t["hidden_size"] for t in self.text_encoders)

    @property
    def pooled_dim(self) -> int | None:
        return self.text_encoders[-1]["projection_dim"] if self.is_xl else None

    @property
    def num_timesteps(self) -> int:
        return self.scheduler.get("num_train_timesteps", 1000)

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the VAE where the rest is in `dtype`: float32 if its config asks for it, as SDXL's own overflows in fp16.

        A config that says nothing is old: it asks for it in an SDXL pipeline, and not in SD's.
        """
        return torch.float32 if self.vae.get("force_upcast", self.is_xl) else dtype


def describe(config: TrainingConfig) -> Description:
    """Reads and checks a pipeline's JSON. Raises UserError for one that is missing or that the method cannot use."""
    name = config.pretrained_model_name_or_path
    index = read_json(name, "model_index.json", config.revision)
    parts = {"unet", "vae", "scheduler", "text_encoder", "tokenizer"}
    if missing := sorted(p for p in parts if not index.get(p) or not index[p][0]):
        raise UserError(f"{name}: the pipeline has no {', '.join(missing)}; expected Stable Diffusion 1.x/2.x or SDXL")
    pipeline = StableDiffusionXLPipeline if index.get("text_encoder_2", [None])[0] else StableDiffusionPipeline
    unet = read_json(name, "unet/config.json", config.revision)
    scheduler = read_json(name, "scheduler/scheduler_config.json", config.revision)
    texts = ["text_encoder", "text_encoder_2"][: 2 if pipeline is StableDiffusionXLPipeline else 1]
    text_encoders = [read_json(name, f"{text}/config.json", config.revision) for text in texts]
    vae_name = config.pretrained_vae_model_name_or_path
    vae = read_json(vae_name, "config.json", None) if vae_name else read_json(name, "vae/config.json", config.revision)

    if index["unet"][1] != "UNet2DConditionModel":
        raise UserError(f"{name}: the denoiser is a {index['unet'][1]}; the method needs a UNet2DConditionModel")
    if unet["in_channels"] != vae["latent_channels"]:
        raise UserError(
            f"{name}: the U-Net takes {unet['in_channels']} channels and the VAE gives {vae['latent_channels']}; "
            "inpainting and other extra-input U-Nets are not supported"
        )
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise UserError(f"{name}: scheduler prediction_type '{kind}'; expected one of: {', '.join(PREDICTION_TYPES)}")
    if "FlowMatch" in scheduler.get("_class_name", ""):
        raise UserError(
            f"{name}: {scheduler['_class_name']} is a flow-matching scheduler; the method needs a DDPM schedule"
        )
    if scheduler.get("rescale_betas_zero_snr"):
        raise UserError(f"{name}: the scheduler has zero terminal SNR, where the reverse step divides by zero")
    if (variance := scheduler.get("variance_type") or "fixed_small") not in VARIANCE_TYPES:
        raise UserError(f"{name}: scheduler variance_type '{variance}'; expected one of: {', '.join(VARIANCE_TYPES)}")
    description = Description(pipeline, unet, vae, scheduler, text_encoders)
    if config.first_timestep >= description.num_timesteps:
        raise UserError(
            f"timestep_offset is {config.timestep_offset}; this schedule has {description.num_timesteps} timesteps"
        )
    for block in config.encoder_blocks:
        try:
            normalize_block(block, len(unet["down_block_types"]))
        except ValueError as error:
            raise UserError(str(error)) from None
    count = len(unet["down_block_types"])
    known = {"all", "encoder", "mid", *(f"{side}{i}" for side in ("down", "up") for i in range(count))}
    if unknown := sorted(set(config.checkpointed_blocks) - known):
        raise UserError(f"checkpointed_blocks: {unknown[0]!r} is none of {', '.join(sorted(known))}")
    multiple = 2 ** (len(vae["block_out_channels"]) - 1)
    if config.resolution % multiple:
        raise UserError(f"resolution is {config.resolution}; this VAE needs a multiple of {multiple}")
    return description


def read_json(name: str, file: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of a model folder or of a hub repository. Raises UserError if it is missing or is none."""
    path = Path(name) / file
    if not Path(name).is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"no such model folder: {name}")
        path = hub.file_of(name, file, revision)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; expected a diffusers pipeline folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def identity(name: str, revision: str | None, part: str) -> str:
    """Which weights these are: a local folder by its content (sampled), a hub model by its commit.

    part: a component's folder in a pipeline, or "" for a repository that is one component, with its config.json.
    """
    if Path(name).is_dir():
        return sampled_sha256(p for p in (Path(name) / part).iterdir() if p.is_file())
    file = hub.file_of(name, "model_index.json" if part else "config.json", revision)
    return f"{name}@{hub.commit_of(file, revision)}"


def scheduler_like(kind: type, source: dict[str, Any], **changes: Any) -> Any:
    """A scheduler of class `kind` over the noise schedule of a pipeline's scheduler config, whatever class that names.

    diffusers' `from_config` fills what the config does not state with the defaults of `kind`, and some of these are
    not Stable Diffusion's. Key by key:

        clip_sample             False: latents are not bounded by 1, to which DDPM's and DDIM's default would clip them
        steps_offset            1, as in all of Stable Diffusion's own configs
        set_alpha_to_one        as stated, else False: DDIM ends at abar of t = 0, as Stable Diffusion's configs say
        variance_type           as stated; null (DPM-Solver's) or not stated is fixed_small
        timestep_spacing        as stated, else the default of `kind`
        thresholding            as stated, else False
        prediction_type, betas  as stated; all classes have the same defaults
        rescale_betas_zero_snr  as stated; raises UserError if it is on and `kind` knows no such thing

    For the first two StableDiffusionPipeline sets these values too, with a page of warnings. `changes` come last.
    """
    known = inspect.signature(kind).parameters
    if source.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise UserError(f"the pipeline's schedule has zero terminal SNR, which {kind.__name__} cannot sample")
    settings = {"set_alpha_to_one": False, **source, "clip_sample": False, "steps_offset": 1}
    settings["variance_type"] = source.get("variance_type") or "fixed_small"
    return kind(**{k: v for k, v in {**settings, **changes}.items() if k in known})
