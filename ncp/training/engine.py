"""The Accelerator and the optimizer for a config."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradScalerKwargs, ProjectConfiguration

from ncp.common.errors import UserError
from ncp.common.processes import launcher_mismatch
from ncp.training import precision
from ncp.training.settings import TrainingConfig


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator for this config.

    Raises UserError for a distributed backend, a precision or a tracker that is not supported here, and if accelerate
    does not see the processes that the launcher started.
    """
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true":
            # Policy, reference and encoder share the weights of one frozen U-Net. Sharding would end this sharing.
            raise UserError(
                f"accelerate is configured for {engine}, which is not supported; use DDP (docs/robustness.md)"
            )
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = False
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA reads it when it starts
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
                # The usual initial loss scale of float16. accelerate divides the loss by the accumulation steps.
                GradScalerKwargs(init_scale=2.0**16 * config.gradient_accumulation_steps),
            ],
        )
    except ValueError as error:
        raise UserError(f"report_to is '{config.report_to}': {str(error).splitlines()[0]}") from None
    if reason := launcher_mismatch(accelerator.num_processes):
        raise UserError(reason)
    if tracker and not accelerator.log_with:  # accelerate silently drops a tracker that is not installed
        raise UserError(f"report_to is '{tracker}', which is not installed (pip install {tracker})")
    for line in precision.notes(config, accelerator.device):
        accelerator.print(f"{'precision':>16}: {line}")
    return accelerator


def effective_batch(config: TrainingConfig, num_processes: int) -> int:
    """Pairs per optimizer step over all processes. Raises UserError if `effective_batch_size` is another number."""
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


def make_optimizer(config: TrainingConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, with 8-bit state if configured."""
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


def learning_rate(config: TrainingConfig, step: int, effective: int) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then `lr_scheduler`. scale_lr: times the batch.

    A function of the step alone. A scheduler object would have state to save, and would step once per process. A
    falling rate would be 0 at the step after the last.
    """
    base = config.learning_rate * (effective if config.scale_lr else 1)
    warmup = config.lr_warmup_steps
    if step < warmup or config.lr_scheduler == "constant_with_warmup":
        return base * min(1.0, step / max(1, warmup))
    rest = (config.max_train_steps + 1 - step) / (config.max_train_steps + 1 - max(1, warmup))  # from 1 towards 0
    return base * (rest if config.lr_scheduler == "linear" else (1 - math.cos(math.pi * rest)) / 2)
