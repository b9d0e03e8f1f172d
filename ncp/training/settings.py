"""The keys that the three training scripts share."""

from __future__ import annotations

import dataclasses
import math
import re

from ncp.common.config import one_item_each, option
from ncp.common.errors import UserError


@dataclasses.dataclass(kw_only=True)
class TrainingConfig:
    """The common keys. Names follow diffusers where it has the same key.

    docs/configuration.md is generated from this class: python docs/configuration.py.
    """

    pretrained_model_name_or_path: str = option(
        group="model",
        doc="model to train, of the architecture of Stable Diffusion 1.x, 2.x, SDXL or SD3: folder of a diffusers "
        "pipeline, hub id, or (not SD3) .safetensors checkpoint as on Civitai",
    )
    single_file_config: str | None = option(
        None,
        doc="for such a checkpoint: diffusers pipeline folder or hub id whose configs and tokenizers fit; null: those "
        "of SD 1.x, SD 2.x or SDXL, and CLIP's tokenizer from the hub",
    )
    prediction_type: str | None = option(
        None,
        choices=("epsilon", "v_prediction", "sample"),
        doc="what the U-Net predicts; null: what the model's scheduler config or its file says. SD3 has no choice",
    )
    rescale_betas_zero_snr: bool | None = option(
        None,
        doc="whether the noise schedule has zero terminal SNR, as that of NoobAI-XL's v-prediction models has; null: "
        "what the model's scheduler config or its file says",
    )
    revision: str | None = option(
        None, doc="branch, tag or commit of the model, if it is a hub id; null: the main branch"
    )
    variant: str | None = option(
        None, doc="variant of the weight files, such as fp16 for files named NAME.fp16.safetensors; null: no variant"
    )
    max_sequence_length: int = option(
        256, low=0, high=512, doc="tokens that SD3's T5 adds to CLIP's; without T5 so many zeros, as in diffusers"
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        doc="VAE to use instead of the model's own: folder or hub id, such as an fp16-safe one for SDXL; null: the "
        "model's own",
    )
    dataset_name: str = option(
        group="data",
        doc="preference pairs in Pick-a-Pic's columns, or in prompt, chosen, rejected: folder of parquet files, one "
        "parquet file, or hub dataset id",
    )
    dataset_split: str = option(
        "train",
        doc="split to train on: in a folder the files named for it (all are train if no file is named for any split), "
        "on the hub the split of that name",
    )
    cache_dir: str | None = option(
        None,
        doc="folder for the datasets library's downloads and its memory-mapped copy of a dataset that is on the hub or "
        "in large row groups; null: the library's default folder",
    )
    cached_latents: str | None = option(
        None,
        doc="folder that cache_latents.py wrote with this config; training reads latents and prompt embeddings from "
        "it. null: encode images and prompts at every step",
    )
    max_train_samples: int | None = option(
        None, low=1, doc="train on the first so many pairs only, for a quick try; null: on all"
    )
    heldout_pairs: int = option(
        0,
        low=0,
        doc="number of pairs, each of another prompt, that are kept out of training, as is every pair that shares a "
        "prompt or an image with them. Their losses show a collapse (warn_winner_drift). 0: none",
    )
    resolution: int = option(512, low=8, high=16384, doc="side of the square training and validation images, in pixels")
    center_crop: bool = option(
        True, doc="cut the square from the middle of the image; false: at a random place, which cannot be cached"
    )
    random_flip: bool = option(True, doc="mirror winner and loser together, in half of the samples")
    time_ids: str = option(
        "image",
        choices=("image", "fixed"),
        doc="size and crop that SDXL is conditioned on; other models have no such condition. image: each training "
        "image's own. fixed: those of an uncropped image of this resolution, as in Diffusion-DPO's code",
    )
    proportion_empty_prompts: float = option(
        0.0, low=0, high=1, doc="share of the samples that train with the empty prompt instead of their own"
    )
    corrupt_images: str = option(
        "error",
        choices=("error", "skip"),
        doc="what happens at an image that cannot be decoded. error: the run stops and names it. skip: the next pair "
        "takes its place, and the log counts it",
    )
    dataloader_num_workers: int = option(
        4, low=0, high=4096, doc="processes per GPU that decode images; 0: the training process decodes them itself"
    )
    space: str = option(
        "perceptual",
        choices=("perceptual", "latent"),
        group="objective",
        doc="what the loss compares. perceptual: features of the frozen model (NCP). latent: predicted noise, for SD3 "
        "velocity (Diffusion-DPO, the baseline)",
    )
    encoder_blocks: list[str] = option(
        ["last"],
        doc="blocks whose outputs are the features. U-Net: last (the last down block), mid, or indices of down blocks. "
        "SD3: n/4, n/2, 3n/4 of its n blocks, last (n/2), or indices. sample: the noisy sample itself, to see what the "
        "blocks add. Of several losses the mean is taken",
    )
    timestep_offset: str = option(
        "1",
        doc="distance k between the noisy timestep t and the timestep t - k at which features are compared, an integer "
        "from 1 to 999; x0: compare the predicted clean samples instead",
    )
    secant: str = option(
        "auto",
        doc="how the small difference of features in eq. 13 is computed. auto: as printed in float32; in half "
        "precision, which would round it away, over a longer step (secant_length). A number s of at least 1: over s "
        "times the step, divided by s, in any precision; 1 is eq. 13 as printed",
    )
    secant_length: float = option(
        0.016,
        above=0,
        doc="length of the longer step that secant auto takes in half precision: its root mean square over the latent, "
        "whose noisy values have a standard deviation near 1",
    )
    output_dir: str = option(
        group="optimisation",
        doc="folder for weights, the resolved config, checkpoints, logs and pictures; new or empty, unless the run is "
        "resumed",
    )
    seed: int = option(
        0,
        low=0,
        high=2**63 - 1,
        doc="seed of everything random: initial LoRA weights, order, crops, mirroring, timesteps, noise",
    )
    train_batch_size: int = option(
        1, low=1, high=65536, doc="pairs per process and forward pass; for train_ncp_sft.py winners"
    )
    gradient_accumulation_steps: int = option(
        1, low=1, doc="forward and backward passes whose gradients are averaged for one optimizer step"
    )
    effective_batch_size: int | None = option(
        None,
        low=1,
        doc="expected pairs per optimizer step; a run whose train_batch_size x gradient_accumulation_steps x processes "
        "differs, such as one on fewer GPUs, is refused. null: no check",
    )
    max_train_steps: int = option(1000, low=1, doc="number of optimizer steps")
    learning_rate: float = option(
        1e-8,
        above=0,
        high=1e6,
        doc="learning rate after warm-up; with scale_lr it is given per pair of the effective batch (1e-8 x 2048 pairs "
        "= 2.05e-5)",
    )
    scale_lr: bool = option(
        True,
        doc="multiply learning_rate by the effective batch size, which is the number of pairs per optimizer step over "
        "all processes",
    )
    lr_scheduler: str = option(
        "constant_with_warmup",
        choices=("constant_with_warmup", "linear", "cosine"),
        doc="learning rate after warm-up: constant, or falling to 0 at max_train_steps, on a line or on half a cosine "
        "wave",
    )
    lr_warmup_steps: int = option(0, low=0, doc="optimizer steps in which the learning rate rises linearly from 0")
    use_8bit_adam: bool = option(
        True, doc="AdamW with its state in 8 bits (bitsandbytes); false: torch's AdamW, state in float32"
    )
    adam_beta1: float = option(0.9, low=0, high=0.99999, doc="AdamW: decay per step of the mean of gradients")
    adam_beta2: float = option(0.999, low=0, high=0.99999, doc="AdamW: decay per step of the mean of squared gradients")
    adam_weight_decay: float = option(
        1e-2, low=0, high=1e6, doc="AdamW: weight decay; each step shrinks the weights by this times the learning rate"
    )
    adam_epsilon: float = option(1e-8, above=0, high=1e6, doc="AdamW: added to the denominator of the update")
    max_grad_norm: float = option(
        1.0,
        above=0,
        doc="largest gradient norm, taken over all LoRA weights together; larger gradients are scaled down to it",
    )
    gradient_checkpointing: bool = option(
        False, doc="recompute activations in the backward pass instead of keeping them: less memory, more time"
    )
    checkpointed_blocks: list[str] = option(
        ["all"],
        doc="blocks that gradient_checkpointing recomputes: all, or some of encoder (the frozen one), mid, down0, "
        "down1, ..., up0, up1, ...; of SD3 block0, block1, ...",
    )
    torch_compile: bool = option(
        False,
        doc="compile transformer and ResNet blocks with torch.compile; the start is slower, the steps after it may be "
        "faster",
    )
    channels_last: bool = option(
        False, doc="store convolution weights channels-last, the layout of many half-precision kernels on GPUs"
    )
    mixed_precision: str = option(
        "fp16",
        choices=("no", "fp16", "bf16"),
        doc="precision of the frozen weights and of the forward and backward passes; no (quoted in YAML) is float32. "
        "LoRA weights, noising and the reverse step are always float32",
    )
    allow_tf32: bool = option(
        True,
        doc="let GPUs from Ampere on use TF32 for what a half-precision run computes in float32, such as SDXL's own "
        "VAE; a run with mixed_precision no never uses it",
    )
    deterministic: bool = option(
        False, doc="use only kernels that give the same bits each time on the same hardware and software; slower"
    )
    rank: int = option(64, low=1, high=65536, doc="rank of the LoRA")
    lora_alpha: float | None = option(
        None, above=0, doc="alpha of the LoRA, whose output is multiplied by lora_alpha / rank; null: equal to rank"
    )
    use_ema: bool = option(
        False,
        doc="keep an exponential moving average of the LoRA weights, which is saved as the result and draws the "
        "pictures",
    )
    ema_decay: float = option(
        0.99,
        low=0,
        high=0.999999,
        doc="share of the old average that is kept at each optimizer step; smaller in the first steps",
    )
    checkpointing_steps: int = option(
        500, low=1, group="running", doc="optimizer steps between checkpoints; the last step writes one in any case"
    )
    checkpoints_total_limit: int | None = option(
        None, low=1, doc="how many checkpoints are kept, the newest ones; null: all"
    )
    resume_from_checkpoint: str | None = option(
        None,
        doc="where the run starts. latest: at the newest whole checkpoint in output_dir. auto: as latest, or from the "
        "beginning if there is none. A checkpoint folder: at that one. null: from the beginning",
    )
    max_train_hours: float | None = option(
        None,
        above=0,
        doc="hours of wall-clock time, loading included, after which the run writes a checkpoint and stops with exit "
        "status 75; null: no limit",
    )
    max_skipped_steps: int = option(
        10,
        low=1,
        doc="optimizer steps in a row whose loss or gradient is not finite, at which the run stops with exit status 3. "
        "Such steps are skipped; an overflow that fp16's loss scaling corrects does not count",
    )
    heldout_steps: int = option(50, low=1, doc="optimizer steps between evaluations of the held-out pairs")
    warn_winner_drift: float = option(
        0.1,
        above=0,
        doc="warn when the loss of held-out winners has risen above the original model's by more than this share "
        "(0.1: by 10%), as the median over the pairs",
    )
    max_winner_drift: float | None = option(
        None,
        above=0,
        doc="stop with exit status 3 when the loss of held-out winners has risen above the original model's by more "
        "than this share (0.1: by 10%), as the median over the pairs; needs heldout_pairs. null: never stop for it",
    )
    ddp_timeout: int = option(
        1800, low=10, high=10**7, doc="seconds that a process waits for the other processes before the run fails"
    )
    logging_steps: int = option(
        1, low=1, doc="optimizer steps between log entries, each of which is the average over those steps"
    )
    report_to: str = option(
        "tensorboard", doc="tracker that gets the log: tensorboard, wandb, another one of accelerate's, or none"
    )
    tracker_project_name: str = option(
        "ncp", doc="name of the project in the tracker; for tensorboard a folder in output_dir/logs"
    )
    validation_prompts: list[str] = option(
        [],
        group="pictures",
        doc="prompts that the reference and the trained model draw from the same noise, at the end of the run and "
        "every validation_steps; without prompts there are no pictures",
    )
    validation_steps: int | None = option(
        None, low=1, doc="optimizer steps between pictures; null: only at the end of the run"
    )
    validation_num_inference_steps: int = option(50, low=1, high=999, doc="DDIM sampling steps of the pictures")
    validation_guidance_scale: float = option(
        7.5, low=0, doc="scale of classifier-free guidance in the pictures; up to 1: no guidance"
    )
    validation_seed: int = option(
        0, low=0, high=2**62, doc="seed of the first picture's noise; each further prompt has the next number"
    )
    push_to_hub: bool = option(
        False,
        group="sharing",
        doc="upload weights, model card, config and pictures to the Hugging Face hub at the end of the run",
    )
    hub_model_id: str | None = option(
        None, doc="hub repository to upload to, NAME or OWNER/NAME; null: the name of output_dir's last folder"
    )
    hub_private_repo: bool = option(True, doc="create that repository as a private one if it does not exist yet")

    def check(self) -> None:
        """Raises UserError for keys that contradict each other."""
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
        """The timestep offset k; None for x0."""
        return None if self.timestep_offset == "x0" else int(self.timestep_offset)
