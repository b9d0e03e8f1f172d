"""The result of a finished run: the LoRA in diffusers' and in kohya's format, and its model card."""

from __future__ import annotations

import glob
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

import ncp
from ncp.common import hub
from ncp.common.files import write_text
from ncp.training.checkpoints import writing
from ncp.training.engine import effective_batch, learning_rate
from ncp.training.kohya import file_name, kohya_metadata, kohya_state, save_kohya
from ncp.training.models import Models, averaged
from ncp.training.pairs import Pairs, describe_filtering
from ncp.training.settings import TrainingConfig
from ncp.training.single_file import is_single_file
from ncp.training.summary import describe_loss
from ncp.training.weights import WEIGHTS, lora_state, save_lora


def write_result(
    config: TrainingConfig,
    method: str,
    accelerator: Accelerator,
    models: Models,
    average: EMAModel | None,
    pairs: Pairs,
    facts: dict[str, Any],
) -> None:
    """Writes the LoRA and the model card into the output folder, beside the config. Uploads them if configured.

    Only the main process writes. With an average of the weights, the LoRA is the average. facts: see `training_facts`.
    """
    if not accelerator.is_main_process:
        return
    folder = Path(config.output_dir)
    effective = effective_batch(config, accelerator.num_processes)
    kohya = folder / file_name(folder)
    with averaged(models, average), writing(folder):
        save_lora(models, folder)
        save_in_kohya_form(config, models, kohya, facts)
        write_text(folder / "README.md", model_card(config, method, models, pairs, effective))
    accelerator.print(f"wrote {folder / WEIGHTS}, and {kohya.name} for {', '.join(models.description.family.READ_BY)}")
    if config.push_to_hub:
        patterns = [
            WEIGHTS,
            glob.escape(kohya.name),
            "README.md",
            "config.yaml",
            "environment.yaml",
            "validation/*.png",
        ]
        hub.upload(folder, config.hub_model_id or folder.name, config.hub_private_repo, patterns)


def save_in_kohya_form(config: TrainingConfig, models: Models, file: Path, facts: dict[str, Any]) -> None:
    """Writes the LoRA a second time: the same float32 numbers under kohya's names."""
    state = lora_state(models.unet)
    alpha = float(config.lora_alpha or config.rank)
    steps = config.max_train_steps
    metadata = kohya_metadata(file.stem, state, alpha, asdict(config), ncp.__version__, steps, facts)
    save_kohya(file, kohya_state(state, alpha, torch.float32), metadata)


def model_card(config: TrainingConfig, method: str, models: Models, pairs: Pairs, effective: int) -> str:
    """The model card of a finished run, in the hub's format. effective: pairs per optimizer step."""
    steps = config.max_train_steps
    base = config.pretrained_model_name_or_path
    kind, family = models.description.pipeline.__name__, models.description.family
    absent = family.left_out(models.description.pipeline, models.description.texts)
    without = "".join(f"{part}=None, " for part in absent if part.startswith(("text_encoder", "tokenizer")))
    asked = "".join(f", {key}={value}" for key, value in family.draw_arguments(config.max_sequence_length).items())
    programs = ", ".join(f"{name} (`{folder}`)" for name, folder in family.READ_BY.items())
    load = "from_single_file" if is_single_file(base) else "from_pretrained"
    own_schedule = ""
    if is_single_file(base) or (config.prediction_type, config.rescale_betas_zero_snr) != (None, None):
        scheduler = family.sampler(models.description.scheduler).config
        keys = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
        stated = ", ".join(f"{key}={scheduler[key]!r}" for key in keys)
        own_schedule = f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {stated})\n"
    pictures = sorted(Path(config.output_dir).glob("validation/*.png"))
    shown = f"\n![reference and tuned](validation/{pictures[-1].name})\n" if pictures else ""
    settings = {
        "method": f"{method}: {describe_loss(config, models.secant)}",
        "data": f"{config.dataset_name}: {len(pairs):,} decisive pairs",
        **({"filtered": describe_filtering(pairs.manifest)} if pairs.manifest else {}),
        "samples seen": f"{steps * effective:,} ({steps} steps of {effective})",
        "learning rate": f"{learning_rate(config, steps, effective):.3g}",
        "LoRA": f"rank {config.rank}, alpha {config.lora_alpha or config.rank}",
        "resolution": config.resolution,
        "precision": config.mixed_precision,
        "seed": config.seed,
    }
    ours = method.startswith("NCP-")
    meaning = "noise-conditioned perceptual preference optimization, arXiv 2406.17636" if ours else "latent baseline"
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""---
base_model: {base}
library_name: diffusers
tags: [lora, text-to-image, diffusion-dpo, preference-optimization]
---

# {method} LoRA for {base}

Made with {method} ({meaning}), version {ncp.__version__}.
{shown}
| | |
|---|---|
{table}

Every setting is in `config.yaml`, the software and hardware in `environment.yaml`.

```python
import torch
from diffusers import {"DDIMScheduler, " * bool(own_schedule)}{kind}

pipe = {kind}.{load}("{base}", {without}torch_dtype=torch.float16).to("cuda")
{own_schedule}pipe.load_lora_weights("{config.hub_model_id or config.output_dir}")
image = pipe("a prompt"{asked}).images[0]
```

`{file_name(Path(config.output_dir))}` is the same LoRA with kohya's key names, for {programs}.
"""
