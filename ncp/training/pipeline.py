"""The JSON files of a diffusers pipeline folder (or hub repository), read and checked without loading weights."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ncp.common import hub
from ncp.common.errors import UserError
from ncp.common.files import sampled_sha256
from ncp.ddpm import PREDICTION_TYPES, VARIANCE_TYPES
from ncp.encoder import normalize_block
from ncp.training import single_file
from ncp.training.settings import TrainingConfig
from ncp.training.weight_files import check_weights

SCHEDULER = "scheduler/scheduler_config.json"
FEW_STEPS = re.compile("turbo|lightning|hyper|lcm|dmd", re.IGNORECASE)
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIPELINES = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}


@dataclass
class Description:
    """The component configs of a pipeline, read without loading weights.

    `scheduler` is the config that the run uses: with the run's `prediction_type` and `rescale_betas_zero_snr`, if set.
    said: the source of the prediction type. notes: lines to print for the user.
    """

    pipeline: Any  # the pipeline's class
    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoders: list[dict[str, Any]]
    said: str = "as its scheduler's config says"
    notes: list[str] = field(default_factory=list)

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

    @property
    def prediction(self) -> str:
        """What the U-Net predicts, in words."""
        zero = " with zero terminal SNR" if self.scheduler.get("rescale_betas_zero_snr") else ""
        return f"{self.scheduler.get('prediction_type', 'epsilon')}{zero}, {self.said}"

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the VAE if the rest is in `dtype`. float32 if its config requires it: SDXL's overflows in fp16.

        An old config does not have the key: then float32 for SDXL, and `dtype` for Stable Diffusion.
        """
        return torch.float32 if self.vae.get("force_upcast", self.is_xl) else dtype


def describe(config: TrainingConfig) -> Description:
    """Reads and checks a pipeline's JSON. Raises UserError if it is missing or the method cannot use the pipeline."""
    name, vae_name = config.pretrained_model_name_or_path, config.pretrained_vae_model_name_or_path

    def read(file: str) -> dict[str, Any]:
        return read_json(name, file, config.revision, config.single_file_config)

    index = read("model_index.json")
    has = {part for part, value in index.items() if isinstance(value, list) and value[0]}
    if ("text_encoder_2" in has and "text_encoder" not in has) or index.get("requires_aesthetics_score"):
        raise UserError(f"{name} is SDXL's refiner, which finishes another model's images; fine-tune the base")
    parts = {"unet", "vae", "scheduler", "text_encoder", "tokenizer"}
    if missing := sorted(parts - has):
        raise UserError(f"{name}: the pipeline has no {', '.join(missing)}; expected Stable Diffusion 1.x/2.x or SDXL")
    pipeline = StableDiffusionXLPipeline if "text_encoder_2" in has else StableDiffusionPipeline
    unet = read("unet/config.json")
    scheduler, said = read_schedule(config)
    texts = ["text_encoder", "text_encoder_2"][: 2 if pipeline is StableDiffusionXLPipeline else 1]
    text_encoders = [read(f"{text}/config.json") for text in texts]
    vae = read_json(vae_name, "config.json", None) if vae_name else read("vae/config.json")

    if index["unet"][1] != "UNet2DConditionModel":
        raise UserError(f"{name}: the denoiser is a {index['unet'][1]}; the method needs a UNet2DConditionModel")
    if unet["in_channels"] != vae["latent_channels"]:
        raise UserError(
            f"{name}: the U-Net takes {unet['in_channels']} channels and the VAE gives {vae['latent_channels']}; "
            "inpainting and other extra-input U-Nets are not supported"
        )
    if unet.get("time_cond_proj_dim") is not None:
        raise UserError(f"{name}: the U-Net takes the guidance scale as an input (LCM); fine-tune the model it is of")
    inputs = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    if extra := [key for key in inputs if unet.get(key) is not None]:
        raise UserError(f"{name}: the U-Net takes more than noise, time and text ({extra[0]}); expected SD or SDXL")
    check_schedule(name, scheduler)
    notes = guesses(config, scheduler)
    description = Description(pipeline, unet, vae, scheduler, text_encoders, said, notes)
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
    check_weights(config, texts)
    return description


def read_schedule(config: Any) -> tuple[dict[str, Any], str]:
    """The scheduler config of the base model, for training or evaluation, and the source of its prediction type.

    `prediction_type` and `rescale_betas_zero_snr` come from `config` where they are not null there. Raises UserError if
    nothing states them.
    """
    name, given = config.pretrained_model_name_or_path, config.single_file_config
    scheduler = read_json(name, SCHEDULER, config.revision, given)
    own = {"prediction_type": config.prediction_type, "rescale_betas_zero_snr": config.rescale_betas_zero_snr}
    own = {key: value for key, value in own.items() if value is not None}
    said = "as its scheduler's config says"
    if single_file.is_single_file(name):
        said = single_file.stated(Path(name))[1]
        unknown = not said and given is None and single_file.architecture(Path(name)) == "sd2"
        if unknown and "prediction_type" not in own:
            raise UserError(
                f"{name}: SD 2.x comes in two kinds, and the file does not say which; set prediction_type: "
                "v_prediction (the models of 768 pixels) or epsilon (the base models of 512)"
            )
        said = said or "as nothing says otherwise"
    if "prediction_type" in own:
        said = f"as {' and '.join(own)} say{'s' * (len(own) == 1)}"
    elif own:
        said += ", but for rescale_betas_zero_snr"
    return scheduler | own, said


def check_schedule(name: str, scheduler: dict[str, Any]) -> None:
    """Raises UserError for a noise schedule or prediction type that the method cannot use."""
    if "FlowMatch" in (found := scheduler.get("_class_name", "")):
        raise UserError(f"{name}: {found} is a flow-matching scheduler; the method needs a DDPM schedule")
    if found.startswith("EDM"):
        raise UserError(f"{name}: {found} has EDM's noise levels (Playground 2.5); the method needs a DDPM schedule")
    check_prediction(name, scheduler)
    if (variance := scheduler.get("variance_type") or "fixed_small") not in VARIANCE_TYPES:
        raise UserError(f"{name}: scheduler variance_type '{variance}'; expected one of: {', '.join(VARIANCE_TYPES)}")


def check_prediction(name: str, scheduler: dict[str, Any]) -> None:
    """Raises UserError for an unknown prediction type, or one that zero terminal SNR does not allow."""
    if (kind := scheduler.get("prediction_type", "epsilon")) not in PREDICTION_TYPES:
        raise UserError(f"{name}: scheduler prediction_type '{kind}'; expected one of: {', '.join(PREDICTION_TYPES)}")
    if kind == "epsilon" and scheduler.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{name}: zero terminal SNR with epsilon, which says nothing of the image where x_t is pure noise; set "
            "prediction_type: v_prediction, or rescale_betas_zero_snr: false"
        )


def guesses(config: TrainingConfig, scheduler: dict[str, Any]) -> list[str]:
    """Settings that look wrong but may be right, a line each."""
    name = Path(config.pretrained_model_name_or_path).name
    lines = []
    few_steps = FEW_STEPS.search(name) or re.match("LCM|TCD", scheduler.get("_class_name", ""))
    if few_steps:
        lines.append(
            f"looks like a model distilled to a few steps ('{few_steps[0]}'); this training's loss is not the one it "
            "was distilled with, and may undo it"
        )
    if single_file.V_PREDICTION.search(name) and scheduler.get("prediction_type", "epsilon") == "epsilon":
        lines.append("its name says v-prediction; if it is right, set prediction_type: v_prediction")
    if single_file.is_single_file(config.pretrained_model_name_or_path) and (config.revision or config.variant):
        lines.append("revision and variant mean nothing to a single file")
    return lines


def read_json(name: str, file: str, revision: str | None, single_file_config: str | None = None) -> dict[str, Any]:
    """A JSON file of a model folder, of a hub repository, or of the pipeline that a single-file checkpoint needs.

    Raises UserError if it is missing or is not a JSON object.
    """
    if single_file.is_single_file(name):
        return single_file.read_json(Path(name), single_file_config, file)
    path = Path(name) / file
    if not Path(name).is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"no such model file or folder: {name}")
        path = hub.file_of(name, file, revision)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; expected a diffusers pipeline folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def identity(name: str, revision: str | None, part: str, single_file_config: str | None = None) -> str:
    """Identifies weights: a local folder or file by its content (sampled), a hub model by its commit.

    part: a component's folder in a pipeline, or "" for a repository that is a single component with its config.json.
    """
    if single_file.is_single_file(name):
        return single_file.identity(Path(name), single_file_config, part)
    if Path(name).is_dir():
        return sampled_sha256(p for p in (Path(name) / part).iterdir() if p.is_file())
    file = hub.file_of(name, "model_index.json" if part else "config.json", revision)
    return f"{name}@{hub.commit_of(file, revision)}"


def scheduler_like(kind: type, source: dict[str, Any], **changes: Any) -> Any:
    """A scheduler of class `kind` with the noise schedule of a pipeline's scheduler config, which may name any class.

    diffusers' `from_config` takes keys that the config does not state from the defaults of `kind`, and some of these
    are not Stable Diffusion's. Key by key:

        clip_sample             False: DDPM and DDIM would by default clip to [-1, 1], but latents exceed it
        steps_offset            1, as in all of Stable Diffusion's own configs
        set_alpha_to_one        as stated, else False: DDIM ends at abar of t = 0, as in Stable Diffusion's configs
        variance_type           as stated; null (DPM-Solver's) or not stated is fixed_small
        timestep_spacing        trailing with zero terminal SNR, where sampling must begin at T-1, in pure noise; else
                                as stated, else the default of `kind`
        thresholding            as stated, else False
        prediction_type, betas  as stated; all classes have the same defaults
        rescale_betas_zero_snr  as stated; raises UserError if it is on and `kind` does not support it

    StableDiffusionPipeline sets the first two to these values too, with long warnings. `changes` are applied last.
    """
    known = inspect.signature(kind).parameters
    if source.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise UserError(f"the pipeline's schedule has zero terminal SNR, which {kind.__name__} cannot sample; DDIM can")
    settings = {"set_alpha_to_one": False, **source, "clip_sample": False, "steps_offset": 1}
    if source.get("rescale_betas_zero_snr"):
        settings["timestep_spacing"] = "trailing"
    settings["variance_type"] = source.get("variance_type") or "fixed_small"
    return kind(**{k: v for k, v in {**settings, **changes}.items() if k in known})
