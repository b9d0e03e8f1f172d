"""The keys that the three training scripts share."""

from __future__ import annotations

import dataclasses
import math
import re

from ncp.common.config import one_item_each, option
from ncp.common.errors import UserError


@dataclasses.dataclass(kw_only=True)
class TrainingConfig:
    """What the three scripts have in common. Names are diffusers' where diffusers has one."""

    # model
    pretrained_model_name_or_path: str = option(
        doc="diffusers pipeline folder, hub id, or .safetensors checkpoint as on Civitai; SD or SDXL architecture"
    )
    single_file_config: str | None = option(
        None,
        doc="of such a checkpoint: a diffusers pipeline folder or hub id whose configs and tokenizers fit; null: those "
        "of SD 1.x, SD 2.x or SDXL, and CLIP's tokenizer from the hub",
    )
    prediction_type: str | None = option(
        None,
        choices=("epsilon", "v_prediction", "sample"),
        doc="what the U-Net predicts; null: as the model says",
    )
    rescale_betas_zero_snr: bool | None = option(
        None, doc="noise schedule with zero terminal SNR, as of NoobAI-XL's v-prediction; null: as the model says"
    )
    revision: str | None = option(None, doc="hub revision of the model")
    variant: str | None = option(None, doc="weight file variant, such as fp16")
    pretrained_vae_model_name_or_path: str | None = option(
        None, doc="another VAE (folder or hub id), such as an fp16-safe one for SDXL; null: the model's own"
    )
    # data
    dataset_name: str = option(doc="folder of Pick-a-Pic parquet shards, one parquet file, or a hub id of that schema")
    dataset_split: str = option("train", doc="split: files or folders named for it, or the hub's split")
    cache_dir: str | None = option(None, doc="where downloads and the memory-mapped copy of the dataset go")
    cached_latents: str | None = option(
        None, doc="folder that cache_latents.py wrote with this config; null: encode images and prompts at every step"
    )
    max_train_samples: int | None = option(None, low=1, doc="use only the first pairs, for a quick try")
    heldout_pairs: int = option(
        0, low=0, doc="pairs whose prompts and images never train, evenly spaced, to watch the run by; 0: none"
    )
    resolution: int = option(512, low=8, high=16384, doc="side of the square training images, in pixels")
    center_crop: bool = option(True, doc="crop the centre; false: a random place, which cannot be cached")
    random_flip: bool = option(True, doc="mirror the images, winner and loser together, half of the time")
    time_ids: str = option(
        "image",
        choices=("image", "fixed"),
        doc="SDXL's size and crop conditions: each image's own; fixed: a whole image of resolution, as Diffusion-DPO",
    )
    proportion_empty_prompts: float = option(0.0, low=0, high=1, doc="share of samples trained on the empty prompt")
    corrupt_images: str = option(
        "error", choices=("error", "skip"), doc="stop at an unreadable image, or skip and count"
    )
    dataloader_num_workers: int = option(4, low=0, high=4096, doc="processes that decode images; 0: the main process")
    # objective
    space: str = option(
        "perceptual",
        choices=("perceptual", "latent"),
        doc="compare U-Net features (NCP) or noise (the latent baseline)",
    )
    encoder_blocks: list[str] = option(
        ["last"], doc="features of the encoder: last, mid, or down-block indices from 0; several count equally"
    )
    timestep_offset: str = option("1", doc="k of t' = t - k, or x0 to compare predictions of the clean sample")
    secant: str = option(
        "auto",
        doc="auto: eq. 13 as printed in float32, a derivative that is right in half precision otherwise; a number s: "
        "that secant, 1 being eq. 13 as printed",
    )
    secant_length: float = option(
        0.016, above=0, doc="step length of secant auto in half precision, in latent standard deviations"
    )
    # optimisation
    output_dir: str = option(doc="where weights, checkpoints, logs and pictures go")
    seed: int = option(0, low=0, high=2**63 - 1, doc="everything random is a function of seed, step and sample")
    train_batch_size: int = option(1, low=1, high=65536, doc="pairs per process and forward pass")
    gradient_accumulation_steps: int = option(1, low=1, doc="forward passes per optimizer step")
    effective_batch_size: int | None = option(
        None,
        low=1,
        doc="if given, must equal batch x accumulation x processes: a guard when the number of GPUs changes",
    )
    max_train_steps: int = option(1000, low=1, doc="optimizer steps")
    learning_rate: float = option(1e-8, above=0, high=1e6, doc="learning rate, before scale_lr")
    scale_lr: bool = option(True, doc="multiply the learning rate by the effective batch size")
    lr_warmup_steps: int = option(0, low=0, doc="steps of linear warm-up; constant afterwards")
    use_8bit_adam: bool = option(True, doc="AdamW8bit of bitsandbytes; false: torch's AdamW")
    adam_beta1: float = option(0.9, low=0, high=0.99999, doc="AdamW's first moment decay")
    adam_beta2: float = option(0.999, low=0, high=0.99999, doc="AdamW's second moment decay")
    adam_weight_decay: float = option(1e-2, low=0, high=1e6, doc="AdamW's weight decay")
    adam_epsilon: float = option(1e-8, above=0, high=1e6, doc="AdamW's epsilon")
    max_grad_norm: float = option(1.0, above=0, doc="gradients are clipped to this norm")
    gradient_checkpointing: bool = option(
        False, doc="recompute activations in the backward pass: less memory, more time"
    )
    checkpointed_blocks: list[str] = option(
        ["all"], doc="which blocks do so: all, or some of encoder, mid, down0, down1, ..., up0, up1, ..."
    )
    torch_compile: bool = option(False, doc="compile transformer and ResNet blocks: a slower start, faster steps")
    channels_last: bool = option(False, doc="store convolution weights channels-last, which suits GPUs' half precision")
    mixed_precision: str = option(
        "fp16", choices=("no", "fp16", "bf16"), doc="of frozen weights and arithmetic; LoRA weights stay float32"
    )
    allow_tf32: bool = option(
        True,
        doc="TF32 on Ampere and later GPUs where half precision leaves float32 (SDXL's VAE); mixed_precision no is "
        "float32 throughout",
    )
    deterministic: bool = option(
        False, doc="only kernels that give the same bits every time on the same hardware and software; slower"
    )
    rank: int = option(64, low=1, high=65536, doc="LoRA rank")
    lora_alpha: float | None = option(None, above=0, doc="LoRA alpha; null: equal to rank")
    use_ema: bool = option(False, doc="keep an exponential moving average of the LoRA weights and save that")
    ema_decay: float = option(0.99, low=0, high=0.999999, doc="decay of that average per step")
    # running
    checkpointing_steps: int = option(500, low=1, doc="steps between checkpoints")
    checkpoints_total_limit: int | None = option(None, low=1, doc="keep this many newest checkpoints; null: all")
    resume_from_checkpoint: str | None = option(
        None, doc="latest, a checkpoint folder, or auto: latest if there is one; null: start afresh"
    )
    max_train_hours: float | None = option(
        None,
        above=0,
        doc="checkpoint and stop after so many hours of wall-clock time, loading included; null: no limit",
    )
    max_skipped_steps: int = option(
        10, low=1, doc="stop after so many steps in a row with a loss or gradient that is not finite"
    )
    heldout_steps: int = option(50, low=1, doc="steps between looks at the held-out pairs")
    warn_winner_drift: float = option(
        0.1, above=0, doc="warn when the median held-out winner's loss exceeds the reference's by this share"
    )
    max_winner_drift: float | None = option(None, above=0, doc="stop when it does by this share; null: go on")
    ddp_timeout: int = option(
        1800, low=10, high=10**7, doc="seconds that a process waits for the others before it gives up"
    )
    logging_steps: int = option(1, low=1, doc="steps between log entries, which average over those steps")
    report_to: str = option("tensorboard", doc="tracker: tensorboard, wandb, another of accelerate's, or none")
    tracker_project_name: str = option("ncp", doc="project name given to the tracker")
    # pictures
    validation_prompts: list[str] = option([], doc="prompts drawn before and after, with fixed seeds")
    validation_steps: int | None = option(None, low=1, doc="draw every so many steps; null: only at the end")
    validation_num_inference_steps: int = option(50, low=1, high=999, doc="sampler steps (DDIM) of validation images")
    validation_guidance_scale: float = option(7.5, low=0, doc="classifier-free guidance of validation images")
    validation_seed: int = option(0, low=0, high=2**62, doc="seed of the first validation image; the others count up")
    # sharing
    push_to_hub: bool = option(False, doc="upload the output folder's weights and model card at the end")
    hub_model_id: str | None = option(None, doc="repository to upload to; null: the output folder's name")
    hub_private_repo: bool = option(True, doc="create that repository as private")

    def check(self) -> None:
        """Rules that span keys. Raises UserError."""
        if self.timestep_offset != "x0" and not (
            self.timestep_offset.isdecimal() and 1 <= int(self.timestep_offset) <= 999
        ):
            raise UserError(f"timestep_offset is '{self.timestep_offset}'; expected an integer from 1 to 999, or x0")
        if self.secant != "auto":
            try:
                valid = 1 <= float(self.secant) < math.inf
            except ValueError:
                valid = False
            if not valid:
                raise UserError(
                    f"secant is '{self.secant}'; expected auto, or a number of at least 1 (1: eq. 13 as printed)"
                )
        if self.cached_latents is not None and not self.center_crop:
            raise UserError("cached_latents needs center_crop: true; a random crop is another image every time")
        if self.max_winner_drift is not None and not self.heldout_pairs:
            raise UserError("max_winner_drift needs heldout_pairs: what drifts is measured on them")
        if not re.fullmatch(r"[^./\\][^/\\]*", self.tracker_project_name):  # names a folder below output_dir/logs
            raise UserError(f"tracker_project_name is {self.tracker_project_name!r}; expected a name, not a path")
        if self.hub_model_id is not None and not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", self.hub_model_id):
            raise UserError(f"hub_model_id is {self.hub_model_id!r}; expected a name, or owner/name")
        one_item_each("encoder_blocks", self.encoder_blocks)
        one_item_each("checkpointed_blocks", self.checkpointed_blocks)
        if not self.encoder_blocks or len(set(self.encoder_blocks)) < len(self.encoder_blocks):
            raise UserError(f"encoder_blocks is {self.encoder_blocks}; expected at least one block, each once")
        if self.lr_warmup_steps > self.max_train_steps:
            raise UserError(
                f"lr_warmup_steps ({self.lr_warmup_steps}) is more than max_train_steps ({self.max_train_steps}): "
                "the learning rate would never be reached"
            )

    @property
    def k(self) -> int | None:
        """The timestep offset; None for x0."""
        return None if self.timestep_offset == "x0" else int(self.timestep_offset)

    @property
    def first_timestep(self) -> int:
        """The smallest t that has a t' = t - k in the schedule (method: t is uniform on {k, ..., T-1})."""
        return self.k or 1
