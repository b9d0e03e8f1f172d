"""Policy, reference and encoder over one frozen model, and the rest of the pipeline, loaded for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ncp.common import hub
from ncp.encoder import Encoder, frozen_twin, precision_of_f
from ncp.training import single_file
from ncp.training.pipeline import DTYPES, Description
from ncp.training.settings import TrainingConfig


@dataclass
class Models:
    """Everything a training step needs, on its device.

    `unet` is the policy: the U-Net, or SD3's transformer, with the LoRA. `base`, the original model, and `encoder`
    share its frozen storage (with bfloat16 the encoder has a copy in another precision, `precision_of_f`). `reference`
    is `base`, or with `reference_decay` one more model over that storage, with a LoRA that is an exponential average of
    the policy's. `pipe` holds text encoders, tokenizers and VAE; with a cache it is None. The VAE may be in float32
    while the rest is in half precision. `secant` is the config's, with "auto" in float32 resolved to "1".
    """

    description: Description
    unet: Any
    base: Any
    reference: Any
    encoder: Encoder
    scheduler: Any
    pipe: Any
    secant: str
    reference_decay: float | None = None

    @property
    def diffusion(self) -> ModuleType:
        """The noise process: ncp.ddpm, or ncp.flow for SD3. Its functions take `scheduler`."""
        return self.description.family.DIFFUSION

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights."""
        return self.base.dtype

    @property
    def lora_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.unet.parameters() if p.requires_grad]

    @property
    def reference_lora(self) -> list[torch.nn.Parameter]:
        """The reference's own LoRA, in the order of `lora_parameters`; empty if it does not follow the policy."""
        return [p for name, p in self.reference.named_parameters() if ".lora_" in name]

    def update_reference(self) -> None:
        """Moves a reference that follows the policy by the share 1 - reference_decay of its distance."""
        if self.reference_decay is not None:
            get_ema_multi_avg_fn(self.reference_decay)(self.reference_lora, self.lora_parameters, 1)


def load_models(config: TrainingConfig, description: Description, accelerator: Accelerator) -> Models:
    """Loads the pipeline, makes the reference and the encoder over its storage, then adds the LoRA.

    With `cached_latents` neither the VAE nor a text encoder is loaded.
    """
    diffusers.utils.logging.disable_progress_bar()
    name = config.pretrained_model_name_or_path
    with hub.loading(name):
        family = description.family
        unet = load_part(config, family.MODEL, family.DENOISER, DTYPES[accelerator.mixed_precision])
    unet.to(accelerator.device)
    pipe = load_pipe(config, description, accelerator) if config.cached_latents is None else None
    return assemble(config, description, unet, description.schedule, pipe, accelerator)


def assemble(
    config: TrainingConfig,
    description: Description,
    unet: Any,
    scheduler: Any,
    pipe: Any,
    accelerator: Accelerator,
) -> Models:
    """Policy with LoRA, base, reference and encoder, all over the storage of `unet`, which becomes the policy.

    At the start the reference is exactly equal to the policy.
    """
    family = description.family
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(accelerator.device)
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    decay = getattr(config, "reference_decay", None)  # only train_ncp_dpo.py has it
    follower = None if decay is None else frozen_twin(unet)
    # Wrapped in the same autocast as the policy, so that at the start the two are exactly equal.
    base = accelerator.prepare_model(frozen_twin(unet), evaluation_mode=True)
    precision = precision_of_f(unet.dtype, accelerator.device)
    encoder = family.ENCODER.from_model(unet, config.encoder_blocks, precision)
    exact = encoder.dtype == torch.float32 and config.secant == "auto"
    torch.manual_seed(config.seed)  # for LoRA's gaussian matrix, the only randomness outside the samples
    unet.add_adapter(lora_config(config, family.LORA_TARGETS))
    # peft gives the LoRA the base's dtype. In half precision, updates of 1e-5 would be rounded away.
    cast_training_params(unet, torch.float32)
    reference = base
    if follower is not None:
        follower.add_adapter(lora_config(config, family.LORA_TARGETS))
        follower.requires_grad_(False)
        reference = accelerator.prepare_model(follower, evaluation_mode=True)
    if config.gradient_checkpointing:
        family.checkpoint_blocks(unet, config.checkpointed_blocks)
        if {"all", "encoder"} & set(config.checkpointed_blocks):
            encoder.enable_gradient_checkpointing()
    if config.torch_compile:
        copies = [unet, base, encoder, *([] if follower is None else [reference])]
        compile_blocks(copies, family.REPEATED, accelerator)
    secant = "1" if exact else config.secant
    models = Models(description, unet, base, reference, encoder, scheduler, pipe, secant, decay)
    for own, policys in zip(models.reference_lora, models.lora_parameters, strict=follower is not None):
        own.data = policys.detach().clone()
    return models


def lora_config(config: TrainingConfig, targets: list[str]) -> LoraConfig:
    """LoRA on the attention projections. targets: their names."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.lora_alpha is None else config.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=targets,
    )


def load_part(config: TrainingConfig, kind: Any, part: str, dtype: torch.dtype) -> Any:
    """The denoiser or the VAE of the model, of class `kind`."""
    name = config.pretrained_model_name_or_path
    if single_file.is_single_file(name):
        return single_file.load_part(Path(name), config.single_file_config, kind, part, dtype)
    where = {"revision": config.revision, "variant": config.variant}
    return kind.from_pretrained(name, subfolder=part, dtype=dtype, use_safetensors=True, **where)


def load_pipe(config: TrainingConfig, description: Description, accelerator: Accelerator) -> Any:
    """The pipeline without its denoiser, frozen, on its device: tokenizers, text encoders and VAE."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    name, dtype = config.pretrained_model_name_or_path, DTYPES[accelerator.mixed_precision]
    vae_name, vae_dtype = config.pretrained_vae_model_name_or_path, description.vae_dtype(dtype)
    family = description.family
    extra = family.left_out(description.pipeline, description.texts) | {
        "scheduler": family.sampler(description.scheduler)
    }
    with hub.loading(vae_name or name):
        if vae_name:
            vae = AutoencoderKL.from_pretrained(vae_name, dtype=vae_dtype, use_safetensors=True)
        else:
            vae = load_part(config, AutoencoderKL, "vae", vae_dtype)
    extra |= {family.DENOISER: None, "vae": None}
    with hub.loading(name):
        if single_file.is_single_file(name):
            path, kind = Path(name), description.pipeline
            pipe = single_file.load_pipeline(path, config.single_file_config, kind, dtype, **extra)
        else:
            where = {"revision": config.revision, "variant": config.variant, "use_safetensors": True}
            pipe = description.pipeline.from_pretrained(name, dtype=dtype, **extra, **where)
    pipe.register_modules(vae=vae)
    pipe.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(accelerator.device)
    for module in (vae, *(getattr(pipe, text) for text in description.texts)):
        module.requires_grad_(False).eval()
    return pipe


def compile_blocks(modules: list[torch.nn.Module], kinds: tuple[str, ...], accelerator: Accelerator) -> None:
    """Compiles the repeated blocks, of classes of these names, in place. Without a compiler it prints a note instead.

    Blocks and not whole models: each kind of block is compiled once per shape, in seconds instead of minutes.
    """
    import torch._dynamo

    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=accelerator.device))
    except Exception as error:  # many kinds, for a missing compiler
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        accelerator.print(f"torch_compile: no working compiler here, going on without ({reason})")
        return
    # One cache entry per width, resolution and grad mode, all needed in the first step. The default, 8, is too few.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    for module in modules:
        for block in module.modules():
            if type(block).__name__ in kinds:
                block.compile(dynamic=False)


@contextmanager
def averaged(models: Models, average: EMAModel | None) -> Iterator[None]:
    """Swaps in the averaged weights inside the block, if there is an average, and restores the training weights."""
    if average is None:
        yield
        return
    average.store(models.lora_parameters)
    average.copy_to(models.lora_parameters)
    try:
        yield
    finally:
        average.restore(models.lora_parameters)
