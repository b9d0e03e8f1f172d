"""The JSON files of a diffusers pipeline folder (or hub repository), read and checked without loading weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ncp.common import hub
from ncp.common.errors import UserError
from ncp.common.files import sampled_sha256
from ncp.training import sd3, single_file, unets
from ncp.training.settings import TrainingConfig
from ncp.training.weight_files import check_weights

SCHEDULER = "scheduler/scheduler_config.json"
FEW_STEPS = re.compile("turbo|lightning|hyper|lcm|dmd", re.IGNORECASE)
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FAMILIES = {kind: family for family in (unets, sd3) for kind in family.PIPELINES}
PIPELINES = {kind.__name__: kind for kind in FAMILIES}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Timesteps:
    """The timesteps of training: all of them, and how one is drawn."""

    among: range
    draw: Callable[[np.random.Generator], int]

    @classmethod
    def of(cls, diffusion: ModuleType, schedule: Any, k: int | None) -> Timesteps:
        """Those of ncp.ddpm or ncp.flow with this scheduler, for a timestep offset k (None: x0)."""
        among = diffusion.timesteps(schedule, k)
        return cls(among, partial(diffusion.draw_timestep, schedule, among))


@dataclass
class Description:
    """The component configs of a pipeline, read without loading weights.

    `scheduler` is the config that the run uses: with the run's `prediction_type` and `rescale_betas_zero_snr`, if set.
    said: the source of the prediction type. notes: lines to print for the user. max_sequence_length: T5's tokens.
    """

    pipeline: Any  # the pipeline's class
    denoiser: dict[str, Any]  # of the U-Net or transformer
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoders: list[dict[str, Any]]
    said: str = "as its scheduler's config says"
    notes: list[str] = field(default_factory=list)
    max_sequence_length: int = 256

    @property
    def family(self) -> ModuleType:
        """The module with what is done for these models alone: ncp.training.unets or ncp.training.sd3."""
        return FAMILIES[self.pipeline]

    @property
    def is_xl(self) -> bool:
        return self.pipeline is StableDiffusionXLPipeline

    @property
    def texts(self) -> tuple[str, ...]:
        """The names of the text encoders."""
        return TEXT_ENCODERS[: len(self.text_encoders)]

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        side = resolution // 2 ** (len(self.vae["block_out_channels"]) - 1)
        return self.denoiser["in_channels"], side, side

    @property
    def text_shape(self) -> tuple[int, int]:
        """(tokens, dimensions) of a prompt's embedding."""
        return self.family.text_shape(self)

    @property
    def pooled_dim(self) -> int | None:
        """Dimensions of a prompt's pooled embedding; None if there is none."""
        return self.family.pooled_dim(self)

    @property
    def num_timesteps(self) -> int:
        return self.scheduler.get("num_train_timesteps", 1000)

    @cached_property
    def schedule(self) -> Any:
        """The scheduler of training."""
        return self.family.schedule(self.scheduler)

    def timesteps(self, k: int | None) -> Timesteps:
        """Those of a run with timestep offset k (None: x0)."""
        return Timesteps.of(self.family.DIFFUSION, self.schedule, k)

    @property
    def prediction(self) -> str:
        """What the model predicts, in words."""
        return f"{self.family.prediction(self.scheduler)}, {self.said}"

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the VAE if the rest is in `dtype`. float32 if its config requires it: SDXL's overflows in fp16.

        An old config does not have the key: then `dtype` for Stable Diffusion 1.x and 2.x, and float32 for the others.
        """
        return torch.float32 if self.vae.get("force_upcast", self.pipeline is not StableDiffusionPipeline) else dtype


def describe(config: TrainingConfig) -> Description:
    """Reads and checks a pipeline's JSON. Raises UserError if it is missing or the method cannot use the pipeline."""
    name, vae_name = config.pretrained_model_name_or_path, config.pretrained_vae_model_name_or_path

    def read(file: str) -> dict[str, Any]:
        return read_json(name, file, config.revision, config.single_file_config)

    index = read("model_index.json")
    has = parts_of(index)
    family = sd3 if sd3.DENOISER in has else unets
    pipeline = family.pipeline_of(name, index, has)
    denoiser = read(f"{family.DENOISER}/config.json")
    scheduler, said = read_schedule(config)
    texts = [text for text in TEXT_ENCODERS if text in has]
    text_encoders = [read(f"{text}/config.json") for text in texts]
    vae = read_json(vae_name, "config.json", None) if vae_name else read("vae/config.json")

    if denoiser["in_channels"] != vae["latent_channels"]:
        raise UserError(
            f"{name}: the {family.MODEL.__name__} takes {denoiser['in_channels']} channels and the VAE gives "
            f"{vae['latent_channels']}; inpainting and other models with extra inputs are not supported"
        )
    notes, length = guesses(config, scheduler), config.max_sequence_length
    description = Description(pipeline, denoiser, vae, scheduler, text_encoders, said, notes, length)
    family.check(name, config, description)
    if not description.timesteps(config.k).among:
        raise UserError(
            f"timestep_offset is {config.timestep_offset}; this schedule has {description.num_timesteps} timesteps"
        )
    for block in config.encoder_blocks:
        try:
            family.ENCODER.tap(block, denoiser)
        except ValueError as error:
            raise UserError(str(error)) from None
    known = {"all", "encoder", *family.checkpointable(denoiser)}
    if unknown := sorted(set(config.checkpointed_blocks) - known):
        raise UserError(f"checkpointed_blocks: {unknown[0]!r} is none of {', '.join(sorted(known))}")
    if config.resolution % (multiple := family.resolution_multiple(description)):
        raise UserError(f"resolution is {config.resolution}; this model needs a multiple of {multiple}")
    check_weights(config, family.DENOISER, texts)
    return description


def parts_of(index: dict[str, Any]) -> set[str]:
    """The parts that a pipeline has, by its model_index.json."""
    return {part for part, value in index.items() if isinstance(value, list) and value[0]}


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
