"""Description of a run in words: printed at its start, and partly used on its model card."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pyarrow.compute as pc
from accelerate import Accelerator
from transformers import CLIPTokenizer

from ncp.training.engine import effective_batch, learning_rate
from ncp.training.models import Models
from ncp.training.pairs import Pairs, describe_filtering
from ncp.training.settings import TrainingConfig
from ncp.training.single_file import is_single_file, load_tokenizer


def print_summary(
    config: TrainingConfig, accelerator: Accelerator, models: Models, pairs: Pairs, first_step: int
) -> None:
    """Prints what the run will do, on the main process."""
    if not accelerator.is_main_process:
        return
    effective = effective_batch(config, accelerator.num_processes)
    samples = effective * config.max_train_steps
    trainable = sum(p.numel() for p in models.lora_parameters)
    c, n = config, accelerator.num_processes
    processes = f"{n} process{'es' * (n > 1)}"
    rate = learning_rate(c, max(1, c.lr_warmup_steps), effective)
    scaled = f"{c.learning_rate:g} x {effective}" if c.scale_lr else "not scaled"
    then = "constant" if c.lr_scheduler == "constant_with_warmup" else f"{c.lr_scheduler} to 0"
    lines = {
        "model": f"{c.pretrained_model_name_or_path} ({models.description.pipeline.__name__}, "
        f"{models.description.prediction})" + "".join(f"; {note}" for note in models.description.notes),
        "data": f"{len(pairs):,} decisive pairs of {len(pairs.table):,} rows in {c.dataset_name}"
        + "".join(f"; {count:,} {reason}" for reason, count in pairs.dropped.items())
        + (f"; {pairs.heldout:,} held out" if pairs.heldout else ""),
        "prompts": describe_prompts(c, models, pairs),
        "filtered": describe_filtering(pairs.manifest) if pairs.manifest else "no (see filter_pickapic.py)",
        "inputs": "images and prompts, encoded at every step"
        if c.cached_latents is None
        else f"cached latents and embeddings in {c.cached_latents}",
        "effective batch": f"{effective} pairs = {c.train_batch_size} x {c.gradient_accumulation_steps} accumulation "
        f"x {processes}",
        "steps": f"{first_step} to {c.max_train_steps}: {samples:,} samples in all, {samples / len(pairs):.2f} epochs",
        "learning rate": f"{rate:.3g} after {c.lr_warmup_steps} warm-up steps, then {then} ({scaled})",
        "loss": describe_loss(c, models.secant),
        "precision": f"{accelerator.mixed_precision} on {accelerator.device}; LoRA rank {c.rank}, "
        f"{trainable:,} weights in float32",
        "output": c.output_dir,
    }
    for name, text in lines.items():
        accelerator.print(f"{name:>16}: {text}")


def describe_prompts(config: TrainingConfig, models: Models, pairs: Pairs) -> str:
    """How many distinct prompts there are, and how many are longer than the text encoder reads."""
    prompts = pc.unique(pairs.columns(["caption"])["caption"].combine_chunks()).to_pylist()
    limit = models.description.text_encoders[0]["max_position_embeddings"]
    # A token covers at least one byte: short prompts need no counting.
    long = [p for p in prompts if len(p.encode()) >= limit // 2]
    name = config.pretrained_model_name_or_path
    if is_single_file(name):
        tokenizer = load_tokenizer(Path(name), config.single_file_config, "tokenizer")
    else:
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", revision=config.revision)
    cut = sum(len(ids) > limit for ids in tokenizer(long, verbose=False).input_ids) if long else 0
    t5 = len(models.description.text_encoders) > 2
    other = f" (T5 reads {config.max_sequence_length})" if t5 else ""
    diffusers.utils.logging.set_verbosity_error()  # hides the warning about cut prompts at every step
    return f"{len(prompts):,} distinct" + (
        f"; {cut:,} of them longer than {limit} tokens, the rest is cut off{other}" if cut else ""
    )


def describe_loss(config: TrainingConfig, secant: str) -> str:
    """The objective in words, beta in both conventions. secant: the config's, as `Models.secant` resolves it."""
    if config.space == "latent":
        text = "squared error of the noise, for SD3 of the velocity (latent baseline)"
    else:
        difference = "eq. 13 as printed" if secant == "1" else f"secant {secant}"
        difference += f" (derivative over {config.secant_length:g})" if secant == "auto" else ""
        offset = "x0" if config.timestep_offset == "x0" else f"t-{config.timestep_offset}"
        text = f"perceptual, block {'+'.join(config.encoder_blocks)} at {offset}, {difference}"
    if (beta := getattr(config, "beta", None)) is not None:
        text += (
            f"; beta {beta:g} (the paper's beta T; {2 * beta:g} where the loss has a factor 0.5, as in Diffusion-DPO)"
        )
    if (mu := getattr(config, "winner_preserving_mu", None)) is not None:
        text += f"; losers scaled to preserve winners, mu {mu:g}"
    if (decay := getattr(config, "reference_decay", None)) is not None:
        text += f"; reference follows the policy, decay {decay:g}"
    if getattr(config, "soft_labels", False):
        text += "; soft labels"
    if getattr(config, "utility", None) == "linear":
        text += f"; linear utility, eta {getattr(config, 'eta', None):g}"
    return text
