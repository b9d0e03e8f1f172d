"""Loading a diffusers pipeline folder (or hub id) for training, and drawing pictures with it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image

from ncp import hub
from ncp.config import TrainingConfig, UserError
from ncp.ddpm import PREDICTION_TYPES, VARIANCE_TYPES
from ncp.encoder import DownBlockEncoder, frozen_twin, normalize_block, precision_of_f
from ncp.files import sampled_sha256

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PIPELINES = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
# Elements of the largest map of one VAE pass. Many kernels count elements with 32 bits, so 2^31 is the end. An eighth
# of it is four images of 512 x 512 through SD's VAE, or one of 1024 x 1024: 2.5 GiB in float32 (memory.encoders), where
# the 128 images of a batch of 64 pairs would need 80.
VAE_ELEMENTS = 1 << 28
PROMPTS_PER_PASS = 64  # of a text encoder: the widest map of SDXL's larger one has 64 x 77 x 5120 = 2.5e7 elements


# ---------------------------------------------------------------- before loading


@dataclass
class Description:
    """What a pipeline folder says of itself: component configs, read without loading a weight."""

    pipeline: type
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


# ---------------------------------------------------------------- loading


@dataclass
class Models:
    """Everything a training step needs, on its device.

    `unet` carries the LoRA; `reference` and `encoder` share its frozen storage (in bfloat16 the encoder has weights of
    its own, `precision_of_f`). `pipe` holds text encoders, tokenizers and VAE; the VAE may be in float32 while the rest
    is in half precision. With a cache it is None. `secant` is the config's, resolved: in float32 "auto" is 1.
    """

    description: Description
    unet: UNet2DConditionModel
    reference: UNet2DConditionModel
    encoder: DownBlockEncoder
    scheduler: DDPMScheduler
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline | None
    secant: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return self.reference.dtype

    @property
    def lora_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.unet.parameters() if p.requires_grad]


def load_models(config: TrainingConfig, description: Description, accelerator: Accelerator) -> Models:
    """Loads the pipeline, makes the reference and the encoder over its storage, then adds the LoRA.

    With `cached_latents` neither the VAE nor a text encoder is loaded.
    """
    diffusers.utils.logging.disable_progress_bar()
    name = config.pretrained_model_name_or_path
    where = {"revision": config.revision, "variant": config.variant, "dtype": DTYPES[accelerator.mixed_precision]}
    with hub.loading(name):
        unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **where).to(accelerator.device)
    pipe = load_pipe(config, description, accelerator) if config.cached_latents is None else None
    scheduler = scheduler_like(DDPMScheduler, description.scheduler)
    return assemble(config, description, unet, scheduler, pipe, accelerator)


def assemble(
    config: TrainingConfig,
    description: Description,
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    pipe: Any,
    accelerator: Accelerator,
) -> Models:
    """The policy with its LoRA, the reference and the encoder, over the storage of `unet`, which becomes the policy."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(accelerator.device)
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    # Wrapped in the same autocast as the policy, so that at the start the two agree to the bit.
    reference = accelerator.prepare_model(frozen_twin(unet), evaluation_mode=True)
    encoder = DownBlockEncoder.from_unet(unet, config.encoder_blocks, precision_of_f(unet.dtype, accelerator.device))
    exact = encoder.unet.dtype == torch.float32 and config.secant == "auto"
    torch.manual_seed(config.seed)  # of LoRA's gaussian half, the only randomness outside the samples
    unet.add_adapter(lora_config(config))
    # A half-precision base makes half-precision LoRA weights: updates of 1e-5 would round to nothing.
    cast_training_params(unet, torch.float32)
    if config.gradient_checkpointing:
        checkpoint_blocks(unet, config.checkpointed_blocks)
        if {"all", "encoder"} & set(config.checkpointed_blocks):
            encoder.enable_gradient_checkpointing()
    if config.torch_compile:
        compile_blocks([unet, reference, encoder], accelerator)
    return Models(description, unet, reference, encoder, scheduler, pipe, secant="1" if exact else config.secant)


def lora_config(config: TrainingConfig) -> LoraConfig:
    """LoRA on the attention projections."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.lora_alpha is None else config.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=LORA_TARGETS,
    )


def checkpoint_blocks(unet: UNet2DConditionModel, names: list[str]) -> None:
    """Has these blocks ("down0", "mid", "up3", ..., or "all") recompute their activations in the backward pass."""
    blocks = {f"down{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks |= {f"up{i}": block for i, block in enumerate(unet.up_blocks)} | {"mid": unet.mid_block}
    unet.enable_gradient_checkpointing()  # sets the function, and every flag
    for name, block in blocks.items():
        for module in block.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = "all" in names or name in names


def compile_blocks(modules: list[torch.nn.Module], accelerator: Accelerator) -> None:
    """Compiles the repeated blocks, transformer and ResNet, in place; without a compiler it says so and goes on.

    Blocks rather than whole models: each kind is compiled once per shape, in seconds instead of minutes.
    """
    import torch._dynamo

    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=accelerator.device))
    except Exception as error:  # whatever a missing compiler raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        accelerator.print(f"torch_compile: no working compiler here, going on without ({reason})")
        return
    # One entry for each width, resolution and grad mode, all from the first step; the default of 8 is too few.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    for module in modules:
        for block in module.modules():
            if type(block).__name__ in ("BasicTransformerBlock", "ResnetBlock2D"):
                block.compile(dynamic=False)


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
    known = inspect.signature(kind.__init__).parameters
    if source.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise UserError(f"the pipeline's schedule has zero terminal SNR, which {kind.__name__} cannot sample")
    settings = {"set_alpha_to_one": False, **source, "clip_sample": False, "steps_offset": 1}
    settings["variance_type"] = source.get("variance_type") or "fixed_small"
    return kind(**{k: v for k, v in {**settings, **changes}.items() if k in known})


def load_pipe(config: TrainingConfig, description: Description, accelerator: Accelerator) -> Any:
    """The pipeline but for its U-Net, frozen, on its device: tokenizers, text encoders and VAE."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    name, dtype = config.pretrained_model_name_or_path, DTYPES[accelerator.mixed_precision]
    where = {"revision": config.revision, "variant": config.variant, "dtype": dtype}
    vae_name, vae_dtype = config.pretrained_vae_model_name_or_path, description.vae_dtype(dtype)
    extra = {} if description.is_xl else {"safety_checker": None, "requires_safety_checker": False}
    extra["scheduler"] = scheduler_like(DDIMScheduler, description.scheduler)
    with hub.loading(vae_name or name):
        if vae_name:
            vae = AutoencoderKL.from_pretrained(vae_name, dtype=vae_dtype)
        else:
            vae = AutoencoderKL.from_pretrained(name, subfolder="vae", **{**where, "dtype": vae_dtype})
    with hub.loading(name):
        pipe = description.pipeline.from_pretrained(name, unet=None, vae=None, **extra, **where)
    pipe.register_modules(vae=vae)
    pipe.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(accelerator.device)
    for module in (vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if module is not None:
            module.requires_grad_(False).eval()
    return pipe


# ---------------------------------------------------------------- conditions, latents, pictures


@torch.no_grad()
def latents(m: Models, batch: dict[str, Any]) -> torch.Tensor:
    """x0 (N, C, h, w) float32: scaled latents of the batch's `pixels` or `moments`, sampled with its `posterior`."""
    moments = batch["moments"] if m.pipe is None else vae_moments(m.pipe.vae, batch["pixels"])
    mean, log_variance = moments.float().chunk(2, dim=1)
    x0 = mean + (log_variance.clamp(-30, 20) / 2).exp() * batch["posterior"]  # AutoencoderKL's bounds
    vae = m.description.vae
    return (x0 - (vae.get("shift_factor") or 0)) * vae.get("scaling_factor", 0.18215)  # AutoencoderKL's default


@torch.no_grad()
def conditions(m: Models, batch: dict[str, Any]) -> dict[str, Any]:
    """The U-Net's keyword arguments for N images of B prompts, the prompts repeated in whole rounds.

    encoder_hidden_states (N, S, D); for SDXL also added_cond_kwargs, with the pooled text_embeds (N, P) and
    the batch's time_ids (N, 6): original size, crop and target size in pixels, height before width. They stay in
    float32, because bfloat16 makes 1024 of 1023; the U-Net casts their sinusoidal embedding.
    """
    text, pooled = (batch["text"], batch.get("pooled")) if m.pipe is None else embed(m.pipe, batch["prompt"])
    rounds = len(batch["time_ids"]) // len(text)
    kwargs: dict[str, Any] = {"encoder_hidden_states": text.to(m.dtype).repeat(rounds, 1, 1)}
    if pooled is not None:
        pooled = pooled.to(m.dtype).repeat(rounds, 1)
        kwargs["added_cond_kwargs"] = {
            "text_embeds": pooled,
            "time_ids": batch["time_ids"].to(pooled.device, torch.float32),
        }
    return kwargs


@torch.no_grad()
def vae_moments(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance (N, 2C, h, w), in the VAE's dtype, of uint8 (N, 3, H, W), in passes of bounded size."""
    parts = pixels.split(images_per_pass(vae.config, max(pixels.shape[-2:])))
    return torch.cat([vae.encode(_normalized(p, vae)).latent_dist.parameters for p in parts])


def _normalized(pixels: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    return (pixels.to(vae.device).float() / 127.5 - 1).to(vae.dtype)


def images_per_pass(vae: dict[str, Any], side: int) -> int:
    """How many images of `side` pixels go through a VAE of this config at once, encoded or decoded; at least 1.

    Its maps: level i has block_out_channels[i] channels at side / 2^i, and the decoder brings those of level i + 1 up
    to the size of level i. The middle block's attention may make a matrix of tokens x tokens.
    """
    channels = vae["block_out_channels"]
    sides = [side / 2**i for i in range(len(channels))]
    maps = [c * s**2 for c, s in zip(channels, sides, strict=True)]
    maps += [c * s**2 for c, s in zip(channels[1:], sides[:-1], strict=True)]
    return max(1, int(VAE_ELEMENTS // max(*maps, sides[-1] ** 4)))


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of scaled latents (N, C, h, w), in the VAE's dtype and in passes of bounded size."""
    z = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    side = max(z.shape[-2:]) * 2 ** (len(vae.config.block_out_channels) - 1)
    pictures = []
    for part in z.split(images_per_pass(vae.config, side)):
        pictures += VaeImageProcessor().postprocess(vae.decode(part).sample.float(), output_type="pil")
    return pictures


@torch.no_grad()
def embed(pipe: Any, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(text (B, S, D), pooled (B, P) for SDXL, else None), in the text encoders' dtype, in passes of bounded size."""
    outputs = [
        pipe.encode_prompt(
            prompt=prompts[i : i + PROMPTS_PER_PASS],
            device=pipe.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        for i in range(0, len(prompts), PROMPTS_PER_PASS)
    ]
    text = torch.cat([o[0] for o in outputs])
    return text, torch.cat([o[2] for o in outputs]) if isinstance(pipe, StableDiffusionXLPipeline) else None


@torch.no_grad()
def draw(
    models: Models,
    pipe: Any,
    unet: torch.nn.Module,
    prompts: list[str],
    seeds: list[int],
    *,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    accelerator: Accelerator,
    batch_size: int = 8,
    between: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """One picture per prompt with DDIM, each from its own seed: the same whatever is drawn beside it.

    pipe: what `load_pipe` gives; unet: the policy or the reference. between: called between sampler steps; it may
    raise, to end the drawing.
    """
    vae, parts = pipe.vae, dict(pipe.components)
    parts |= {"unet": unet, "scheduler": scheduler_like(DDIMScheduler, models.description.scheduler)}
    if not isinstance(pipe, StableDiffusionXLPipeline):
        parts["requires_safety_checker"] = False
    pipe = type(pipe)(**parts)
    pipe.set_progress_bar_config(disable=True)
    training, images = unet.training, []
    unet.eval()
    for i in range(0, len(prompts), batch_size):
        with accelerator.autocast():
            latents = pipe(
                prompts[i : i + batch_size],
                height=resolution,
                width=resolution,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(s) for s in seeds[i : i + batch_size]],
                output_type="latent",
                callback_on_step_end=lambda pipe, step, timestep, kwargs: (between(), kwargs)[1],
            ).images
        images += decode(vae, latents)  # outside autocast: a VAE that needs float32 gets it
    unet.train(training)
    return images
