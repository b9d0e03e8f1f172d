"""What surrounds the loop of a training script: start-up, schedule, checkpoints, logs, pictures, the result."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pyarrow.compute as pc
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradScalerKwargs, ProjectConfiguration, broadcast_object_list
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw
from transformers import CLIPTokenizer

import ncp
from ncp import hub, precision
from ncp.cache import columns_of
from ncp.checkpoints import WEIGHTS, read_manifest, save_lora, writing
from ncp.config import TrainingConfig, UserError
from ncp.data import Pairs, describe_manifest
from ncp.lock import release
from ncp.models import Models, draw, load_pipe
from ncp.processes import misunderstanding

if TYPE_CHECKING:
    from ncp.guard import Guard

# ---------------------------------------------------------------- start


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate's engine for this config.

    Raises UserError for an engine, precision or tracker that it cannot have, and if it misunderstands its launcher.
    """
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true":
            # The policy, the reference and the encoder share one frozen U-Net, which sharding would take apart.
            raise UserError(
                f"accelerate is configured for {engine}, which is not supported; use DDP (docs/robustness.md)"
            )
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = False
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which CUDA reads when it starts
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision is fp16, which needs a GPU; without one use no")
    if config.mixed_precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("mixed_precision is bf16, which this GPU does not support; use fp16 or no")
    precision.set_tf32(config)
    tracker = None if config.report_to == "none" else config.report_to
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout)),
                # float16's usual scale, for the loss before accumulation divides it.
                GradScalerKwargs(init_scale=2.0**16 * config.gradient_accumulation_steps),
            ],
        )
    except ValueError as error:
        raise UserError(f"report_to is '{config.report_to}': {str(error).splitlines()[0]}") from None
    if reason := misunderstanding(accelerator.num_processes):
        raise UserError(reason)
    if tracker and not accelerator.log_with:  # accelerate drops a tracker that is not installed without a word
        raise UserError(f"report_to is '{tracker}', which is not installed (pip install {tracker})")
    for line in precision.notes(config, accelerator.device):
        accelerator.print(f"{'precision':>16}: {line}")
    return accelerator


def effective_batch(config: TrainingConfig, num_processes: int) -> int:
    """Pairs per optimizer step over all processes. Raises UserError if `effective_batch_size` asks for another."""
    product = config.train_batch_size * config.gradient_accumulation_steps * num_processes
    if config.effective_batch_size not in (None, product):
        accumulation, rest = divmod(config.effective_batch_size, config.train_batch_size * num_processes)
        advice = f"; set gradient_accumulation_steps: {accumulation}" if accumulation and not rest else ""
        raise UserError(
            f"effective_batch_size is {config.effective_batch_size}, but train_batch_size {config.train_batch_size} x "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps} x {num_processes} processes = {product}"
            + advice
        )
    return product


def start_trackers(config: TrainingConfig, accelerator: Accelerator, pairs: Pairs) -> None:
    if accelerator.log_with:
        settings = asdict(config) | ({"filtered": describe_manifest(pairs.manifest)} if pairs.manifest else {})
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
        with writing(Path(config.output_dir)):
            accelerator.init_trackers(config.tracker_project_name, config=plain)


def log(config: TrainingConfig, accelerator: Accelerator, figures: dict[str, float], step: int) -> None:
    """Hands figures to the tracker, if there are any."""
    if figures:
        with writing(Path(config.output_dir)):
            accelerator.log(figures, step=step)


def end(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Closes trackers and gives the output folder up. The process group is left later, by `ncp.config.run`."""
    with writing(Path(config.output_dir)):
        for tracker in accelerator.trackers:
            tracker.finish()
    release()


def learning_rate(config: TrainingConfig, step: int, effective: int) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then constant; scaled by the effective batch if asked.

    A function of the step alone: a scheduler object would have a state to save, and steps once per process.
    """
    base = config.learning_rate * (effective if config.scale_lr else 1)
    return base * min(1.0, step / max(1, config.lr_warmup_steps))


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def to_device(batch: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """The batch on this process's device. Raises UserError if the loader met a corrupt image."""
    if "error" in batch:
        raise UserError(batch["error"], everywhere=False)
    return {k: v.to(accelerator.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def make_optimizer(config: TrainingConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, its state in 8 bits if configured."""
    if config.use_8bit_adam:
        import bitsandbytes

        kind: Any = bitsandbytes.optim.AdamW8bit
    else:
        kind = torch.optim.AdamW
    return kind(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )


def make_ema(config: TrainingConfig, models: Models) -> EMAModel | None:
    return EMAModel(models.lora_parameters, decay=config.ema_decay) if config.use_ema else None


@contextmanager
def averaged(models: Models, ema: EMAModel | None) -> Iterator[None]:
    """The averaged weights inside the block, if there is an average; the training weights again after it."""
    if ema is None:
        yield
        return
    ema.store(models.lora_parameters)
    ema.copy_to(models.lora_parameters)
    try:
        yield
    finally:
        ema.restore(models.lora_parameters)


def announce(config: TrainingConfig, accelerator: Accelerator, models: Models, pairs: Pairs, first_step: int) -> None:
    """Says what the run will do, on the main process."""
    if not accelerator.is_main_process:
        return
    effective = effective_batch(config, accelerator.num_processes)
    samples = effective * config.max_train_steps
    trainable = sum(p.numel() for p in models.lora_parameters)
    c, n = config, accelerator.num_processes
    processes = f"{n} process{'es' * (n > 1)}"
    rate = learning_rate(c, c.max_train_steps, effective)
    scaled = f"{c.learning_rate:g} x {effective}" if c.scale_lr else "not scaled"
    lines = {
        "model": f"{c.pretrained_model_name_or_path} ({models.description.pipeline.__name__}, "
        f"{models.scheduler.config.prediction_type})",
        "data": f"{len(pairs):,} decisive pairs of {len(pairs.table):,} rows in {c.dataset_name}"
        + "".join(f"; {count:,} {reason}" for reason, count in pairs.dropped.items())
        + (f"; {pairs.heldout:,} held out" if pairs.heldout else ""),
        "prompts": describe_prompts(c, models, pairs),
        "filtered": describe_manifest(pairs.manifest) if pairs.manifest else "no (see filter_pickapic.py)",
        "inputs": "images and prompts, encoded at every step"
        if c.cached_latents is None
        else f"cached latents and embeddings in {c.cached_latents}",
        "effective batch": f"{effective} pairs = {c.train_batch_size} x {c.gradient_accumulation_steps} accumulation "
        f"x {processes}",
        "steps": f"{first_step} to {c.max_train_steps}: {samples:,} samples in all, {samples / len(pairs):.2f} epochs",
        "learning rate": f"{rate:.3g} after {c.lr_warmup_steps} warm-up steps ({scaled})",
        "loss": describe_loss(c, models.secant),
        "precision": f"{accelerator.mixed_precision} on {accelerator.device}; LoRA rank {c.rank}, "
        f"{trainable:,} weights in float32",
        "output": c.output_dir,
    }
    for name, text in lines.items():
        accelerator.print(f"{name:>16}: {text}")


def describe_prompts(config: TrainingConfig, models: Models, pairs: Pairs) -> str:
    """How many distinct prompts there are, and how many are longer than the text encoder reads."""
    prompts = pc.unique(columns_of(pairs, ["caption"])["caption"].combine_chunks()).to_pylist()
    limit = models.description.text_shape[0]
    # A token stands for at least a byte: short ones need no counting.
    long = [p for p in prompts if len(p.encode()) >= limit // 2]
    name, revision = config.pretrained_model_name_or_path, config.revision
    tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", revision=revision)
    cut = sum(len(ids) > limit for ids in tokenizer(long, verbose=False).input_ids) if long else 0
    diffusers.utils.logging.set_verbosity_error()  # which would repeat at every step that a prompt was cut
    return f"{len(prompts):,} distinct" + (
        f"; {cut:,} of them longer than {limit} tokens, the rest is cut off" if cut else ""
    )


def describe_loss(config: TrainingConfig, secant: str) -> str:
    """The objective in words, beta in both conventions. secant: the config's, as `Models.secant` resolves it."""
    if config.space == "latent":
        text = "squared error of the noise (latent baseline)"
    else:
        difference = "eq. 13 as printed" if secant == "1" else f"secant {secant}"
        difference += f" (derivative over {config.secant_length:g})" if secant == "auto" else ""
        offset = "x0" if config.timestep_offset == "x0" else f"t-{config.timestep_offset}"
        text = f"perceptual, block {'+'.join(config.encoder_blocks)} at {offset}, {difference}"
    if (beta := getattr(config, "beta", None)) is not None:
        text += (
            f"; beta {beta:g} (the paper's beta T; {2 * beta:g} where the loss has a factor 0.5, as in Diffusion-DPO)"
        )
    return text


# ---------------------------------------------------------------- figures


class Meter:
    """Averages metrics over micro-batches, processes and the steps between two log entries, and keeps the time.

    `seconds` counts what lies between `start` and `stop`: training, without checkpoints and pictures. A resumed run
    goes on from its checkpoint's.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        saved = read_manifest(checkpoint) if checkpoint else {}
        self.seconds = float(saved.get("seconds", 0))
        self._clear()
        if "meter" in saved:
            self.counts.update(saved["meter"]["counts"])
            self.sums.update({name: torch.tensor(value) for name, value in saved["meter"]["sums"].items()})
            self.samples, self.before = saved["meter"]["samples"], saved["meter"]["before"]

    def _clear(self) -> None:
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        self.counts: dict[str, int] = defaultdict(int)
        self.samples, self.before = 0, self.seconds

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self.started

    def add(self, metrics: dict[str, torch.Tensor | float], samples: int = 0) -> None:
        """Per-sample tensors or scalars; `samples` counts this process's pairs."""
        for name, value in metrics.items():
            # Summed on the device: reading a value here would make the host wait for it at every step.
            mean = value.detach().float().mean() if torch.is_tensor(value) else torch.tensor(float(value))
            self.sums[name] = self.sums[name].to(mean.device) + mean
            self.counts[name] += 1
        self.samples += samples

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """For a checkpoint: with it, a resumed run logs what this one would have."""
        names, sums = sorted(self.sums), []
        if names:
            own = torch.stack([self.sums[n].to(accelerator.device) for n in names])
            sums = accelerator.reduce(own, reduction="mean").tolist()
        meter = {"sums": dict(zip(names, sums, strict=True)), "counts": dict(self.counts)}
        return {"seconds": self.seconds, "meter": {**meter, "samples": self.samples, "before": self.before}}

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last flush over all processes, with samples per second and peak memory in GiB."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[n].to(accelerator.device) / self.counts[n] for n in names])
        means = accelerator.reduce(means, reduction="mean")
        figures = dict(zip(names, means.tolist(), strict=True))
        figures["samples_per_second"] = self.samples * accelerator.num_processes / (self.seconds - self.before)
        figures["peak_memory_gib"] = peak_memory_gib(accelerator.device)
        self._clear()
        return figures


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory in use so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # on Unix alone

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---------------------------------------------------------------- pictures


class Abandoned(Exception):
    """Pictures that are not finished, because a signal or the clock ends the run."""


def pictures_due(config: TrainingConfig, step: int) -> bool:
    """Whether pictures are drawn between this step and the next."""
    each, last = config.validation_steps, config.max_train_steps
    return bool(config.validation_prompts) and each is not None and step % each == 0 and step < last


def pictures_owed(config: TrainingConfig, accelerator: Accelerator, checkpoint: Path | None, step: int) -> bool:
    """Whether the run that left `checkpoint` was to draw pictures at its step and has not. The main process looks."""
    owed = checkpoint is not None and pictures_due(config, step) and not _picture_file(config, step).is_file()
    (owed,) = broadcast_object_list([owed])
    return owed


def _picture_file(config: TrainingConfig, step: int) -> Path:
    return Path(config.output_dir) / "validation" / f"step-{step:06d}.png"


def validate(
    config: TrainingConfig,
    models: Models,
    accelerator: Accelerator,
    ema: EMAModel | None,
    step: int,
    cache: dict[str, Any],
    guard: Guard,
) -> None:
    """Draws the validation prompts with the reference and with the tuned model, and saves both as one grid.

    `cache` keeps the reference's pictures between calls. The main process draws; the others wait, a sampler step at a
    time. If a signal comes or the time is over, it ends without pictures, and `guard.stopped` says so.
    """
    if not config.validation_prompts:
        return
    picture = None
    if accelerator.is_main_process:
        with suppress(Abandoned):
            picture = _pictures(config, models, accelerator, ema, step, cache, partial(guard.between, step))
    guard.together(step, iter(()))
    if picture is not None:
        file = _picture_file(config, step)
        with writing(Path(config.output_dir)):
            file.parent.mkdir(exist_ok=True)
            picture.save(file)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
                    picture.height, picture.width, 3
                )
                tracker.writer.add_image("validation", pixels, step, dataformats="HWC")
            elif tracker.name == "wandb":
                import wandb

                tracker.log({"validation": wandb.Image(picture)}, step=step)
    accelerator.wait_for_everyone()


def _pictures(
    config: TrainingConfig,
    models: Models,
    accelerator: Accelerator,
    ema: EMAModel | None,
    step: int,
    cache: dict[str, Any],
    between: Callable[[], None],
) -> Image.Image:
    """The grid. `between` is called between sampler steps, and may raise."""
    prompts = config.validation_prompts
    seeds = [config.validation_seed + i for i in range(len(prompts))]
    settings = {
        "resolution": config.resolution,
        "num_inference_steps": config.validation_num_inference_steps,
        "guidance_scale": config.validation_guidance_scale,
        "accelerator": accelerator,
        "between": between,
    }
    pipe = models.pipe or load_pipe(config, models.description, accelerator)  # with a cache: only while drawing
    if "reference" not in cache:
        cache["reference"] = draw(models, pipe, models.reference, prompts, seeds, **settings)
    with averaged(models, ema):
        tuned = draw(models, pipe, models.unet, prompts, seeds, **settings)
    return grid({"reference": cache["reference"], f"step {step}": tuned}, prompts)


def grid(rows: dict[str, list[Image.Image]], prompts: list[str], cell: int = 160) -> Image.Image:
    """Labelled rows of pictures, one column per prompt, the prompt wrapped above its column."""
    side = max(cell, max(i.width for images in rows.values() for i in images))
    left, top, line = 90, 6, 13
    texts = [_wrap(p, side // 6) for p in prompts]
    head = top + line * max(len(t) for t in texts)
    picture = Image.new("RGB", (left + side * len(prompts), head + side * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for column, text in enumerate(texts):
        for number, words in enumerate(text):
            pen.text((left + side * column + 3, 3 + line * number), words, fill="black")
    for row, (name, images) in enumerate(rows.items()):
        pen.text((4, head + side * row + side // 2), name, fill="black")
        for column, image in enumerate(images):
            resample = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            shown = image.resize((side - 4, side - 4), resample)
            picture.paste(shown, (left + side * column + 2, head + side * row + 2))
    return picture


def _wrap(text: str, width: int, most: int = 3) -> list[str]:
    import textwrap

    return textwrap.wrap(text, max(8, width), max_lines=most, placeholder=" ...") or [""]


# ---------------------------------------------------------------- the result


def finish(
    config: TrainingConfig,
    models: Models,
    pairs: Pairs,
    accelerator: Accelerator,
    ema: EMAModel | None,
    method: str,
    step: int,
    effective: int,
) -> None:
    """Writes the LoRA and the model card into the output folder, beside the config, and uploads them if asked."""
    if not accelerator.is_main_process:
        return
    folder = Path(config.output_dir)
    with averaged(models, ema), writing(folder):
        save_lora(models, folder)
        (folder / "README.md").write_text(model_card(config, models, pairs, method, step, effective), encoding="utf-8")
    accelerator.print(f"wrote {folder / WEIGHTS}")
    if config.push_to_hub:
        patterns = [WEIGHTS, "README.md", "config.yaml", "validation/*.png"]
        hub.upload(folder, config.hub_model_id or folder.name, config.hub_private_repo, patterns)


def model_card(config: TrainingConfig, models: Models, pairs: Pairs, method: str, step: int, effective: int) -> str:
    """The model card, in the hub's format."""
    base = config.pretrained_model_name_or_path
    kind = models.description.pipeline.__name__
    pictures = sorted(Path(config.output_dir).glob("validation/*.png"))
    shown = f"\n![reference and tuned](validation/{pictures[-1].name})\n" if pictures else ""
    settings = {
        "method": f"{method}: {describe_loss(config, models.secant)}",
        "data": f"{config.dataset_name}: {len(pairs):,} decisive pairs",
        **({"filtered": describe_manifest(pairs.manifest)} if pairs.manifest else {}),
        "samples seen": f"{step * effective:,} ({step} steps of {effective})",
        "learning rate": f"{learning_rate(config, step, effective):.3g}",
        "LoRA": f"rank {config.rank}, alpha {config.lora_alpha or config.rank}",
        "resolution": config.resolution,
        "precision": config.mixed_precision,
        "seed": config.seed,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""---
base_model: {base}
library_name: diffusers
tags: [lora, text-to-image, diffusion-dpo, preference-optimization]
---

# {method} LoRA for {base}

Made with {method} (noise-conditioned perceptual preference optimization, arXiv 2406.17636), version {ncp.__version__}.
{shown}
| | |
|---|---|
{table}

Every setting is in `config.yaml`.

```python
import torch
from diffusers import {kind}

pipe = {kind}.from_pretrained("{base}", torch_dtype=torch.float16).to("cuda")
pipe.load_lora_weights("{config.hub_model_id or config.output_dir}")
image = pipe("a prompt").images[0]
```
"""
