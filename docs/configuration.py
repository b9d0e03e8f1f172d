"""Writes docs/configuration.md: every key of every program, and the published settings beside the configs'.

Run it from anywhere: python docs/configuration.py
"""

from __future__ import annotations

import importlib
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ncp.common.config import accepted, as_text, default_of, grouped, parse  # noqa: E402 (after the path)

COMMAND = "python docs/configuration.py"

# Each program's configuration, as MODULE:CLASS, and the part of it that the page has shown before. cache_latents.py has
# the keys of the training scripts together, and none of its own.
SHARED = "ncp.training.settings:TrainingConfig"
PROGRAMS = {
    "train_ncp_dpo.py": ("train_ncp_dpo:Config", SHARED),
    "train_ncp_cpo.py": ("train_ncp_cpo:Config", SHARED),
    "train_ncp_sft.py": ("train_ncp_sft:Config", SHARED),
    "filter_pickapic.py": ("filtering.settings:FilterConfig", None),
    "evaluate.py": ("evaluation.protocol:EvaluationConfig", None),
    "export_lora.py": ("export_lora:ExportConfig", None),
}

INTRODUCTION = f"""# Configuration

<!-- Made by {COMMAND}. Edit the dataclasses, or the texts in docs/configuration.py. -->

Every program takes `--config FILE`, a YAML file, and `--KEY VALUE` for any key; the command line wins. Both have the
same types and ranges, and an unknown key is refused. A list is written `[a, b]` in both; a bare text is one item. On
the command line a switch alone means true: `--use_ema`. `--help` of each program says the same as this page.

A file in `configs/` holds what defines its run, in the order of this page; all other keys have their defaults. What a
run was made with, every key of it, is in `config.yaml` in its output folder, which is a config file too.

Contents: [published settings](#published-settings), [training](#training), [filter](#filter_pickapicpy),
[evaluation](#evaluatepy), [export](#export_lorapy).
"""

PUBLISHED = """## Published settings

"Paper": *Aligning Diffusion Models with Noise-Conditioned Perception* (arXiv 2406.17636) and its launch scripts;
"second version": arXiv v2 of December 2025. "Diffusion-DPO": *Diffusion Model Alignment Using Direct Preference
Optimization* (arXiv 2311.12908) and its code. The two columns on the right are read from the config files, the large
runs on all pairs and the short ones on filtered pairs; a file that differs from the others of its column is named. A
dash: not published, or not applicable. How the methods themselves differ: [differences.md](differences.md).
"""

ADAPTER = "LoRA rank 64 on `to_q`, `to_k`, `to_v`, `to_out.0`, gaussian start"
RATE = (
    "1e-8 per pair of the batch, 2.05e-5 at 2048 (one launch script: 5e-7); second version: three times "
    "Diffusion-DPO's on filtered pairs"
)
OPTIMIZER = "AdamW 8-bit"
# Rows: what, the config's key, the paper's setting, Diffusion-DPO's.
SETTINGS = {
    "SD 1.5": [
        ("pairs", "dataset_name", "851,293 decisive pairs of Pick-a-Pic v2, or 87,687 filtered", "the decisive pairs"),
        ("resolution", "resolution", "512", "512"),
        ("what trains", "rank", ADAPTER, "the whole U-Net"),
        ("LoRA alpha", "lora_alpha", "equal to the rank", "–"),
        ("beta", "beta", "2500", "5000 with a factor of 0.5, the same as 2500"),
        ("lambda of CPO", "lam", "–", "–"),
        ("pairs per forward pass", "train_batch_size", "64", "–"),
        ("accumulation", "gradient_accumulation_steps", "8", "–"),
        ("pairs per step", "effective_batch_size", "512 per GPU: 2048 on four", "2048"),
        ("steps", "max_train_steps", "1000 to 1500; 7.5% of Diffusion-DPO's pairs on filtered ones", "2000"),
        ("learning rate", "learning_rate", RATE, "1e-8 per pair of the batch"),
        ("multiplied by the batch", "scale_lr", "yes", "yes"),
        ("warm-up, then constant", "lr_warmup_steps", "launch script 250, text 500", "500"),
        ("optimizer in 8 bits", "use_8bit_adam", OPTIMIZER, "AdamW"),
        ("betas", "adam_beta1 adam_beta2", "0.9, 0.999", "–"),
        ("epsilon", "adam_epsilon", "1e-8", "–"),
        ("weight decay", "adam_weight_decay", "1e-2", "–"),
        ("gradient clipping", "max_grad_norm", "1", "–"),
        ("empty prompts", "proportion_empty_prompts", "none", "20%"),
        ("VAE", "pretrained_vae_model_name_or_path", "the model's own", "–"),
    ],
    "SDXL, where it differs": [
        ("resolution", "resolution", "1024", "1024"),
        ("pairs per forward pass", "train_batch_size", "8", "–"),
        ("accumulation", "gradient_accumulation_steps", "64", "–"),
        ("steps", "max_train_steps", "2000; 2% of Diffusion-DPO's pairs on filtered ones", "2000"),
        ("warm-up, then constant", "lr_warmup_steps", "500", "200"),
        ("optimizer in 8 bits", "use_8bit_adam", OPTIMIZER, "Adafactor"),
        ("VAE", "pretrained_vae_model_name_or_path", "one that is safe in fp16, or float32", "–"),
        ("size and crop conditions", "time_ids", "–", "fixed"),
    ],
}
FAMILIES = {"SD 1.5": "sd15", "SDXL, where it differs": "sdxl"}

TRAINING = """## Training

`train_ncp_dpo.py`, `train_ncp_cpo.py` and `train_ncp_sft.py` share these keys. `cache_latents.py` takes the config of
any of the three, and every key of theirs.
"""


def find(place: str) -> type:
    """The class at MODULE:CLASS."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, PUBLISHED]
    parts += [published_table(title) for title in SETTINGS]
    parts += [TRAINING, key_tables(find(SHARED))]
    for program, (place, shown) in PROGRAMS.items():
        level = "###" if shown else "##"
        also = ", beside the shared keys" if shown else ""
        parts += [f"{level} {program}{also}\n", key_tables(find(place), find(shown) if shown else None)]
    return "\n".join(parts)


def key_tables(cls: type, without: type | None = None) -> str:
    """A table for each group of a configuration's keys, without those of its base class `without`."""
    hints = typing.get_type_hints(cls)
    known = getattr(without, "__dataclass_fields__", {})
    tables = []
    for group, fields in grouped(cls).items():
        rows = []
        for field in (f for f in fields if f.name not in known):
            default = default_of(field).removeprefix("default: ")
            rows.append([f"`{field.name}`", marked(field.metadata["doc"]), accepted(field, hints[field.name]), default])
        if rows:
            heading = f"### {group}\n\n" if group and without is None else ""
            tables.append(heading + table(["key", "meaning", "accepts", "default"], rows))
    return "\n".join(tables)


def marked(text: str) -> str:
    """Names with an underscore as code."""
    return re.sub(r"[\w./=-]*_[\w./=-]*\w", r"`\g<0>`", text)


def published_table(title: str) -> str:
    """The published settings of one model beside those of its configs."""
    arch = FAMILIES[title]
    full = sorted((ROOT / "configs").glob(f"{arch}_full_*.yaml"))
    short = sorted(set((ROOT / "configs").glob(f"{arch}_*.yaml")) - set(full))
    columns = {f"`{arch}_full_*.yaml`": read(full), f"other `{arch}_*.yaml`": read(short)}
    rows = [
        [what, " ".join(f"`{key}`" for key in keys.split()), paper, dpo, *(settings(c, keys) for c in columns.values())]
        for what, keys, paper, dpo in SETTINGS[title]
    ]
    return f"### {title}\n\n" + table(["setting", "key", "paper", "Diffusion-DPO", *columns], rows)


def read(files: Sequence[Path]) -> dict[str, Any]:
    """Name to configuration of training configs."""
    programs = {f.stem: find(PROGRAMS[f"train_ncp_{f.stem.rpartition('_')[2]}.py"][0]) for f in files}
    return {f.stem: parse(programs[f.stem], ["--config", str(f)]) for f in files}


def settings(configs: dict[str, Any], keys: str) -> str:
    """The values of the keys in most of these configs, then those of the others by name."""
    by_value: dict[str, list[str]] = {}
    for name, config in configs.items():
        if all(hasattr(config, key) for key in keys.split()):
            text = ", ".join(as_text(getattr(config, key)) for key in keys.split())
            by_value.setdefault(text, []).append(name)
    if not by_value:
        return "–"
    usual = max(by_value, key=lambda text: len(by_value[text]))
    others = [f"`{n}`: {text}" for text, names in by_value.items() if text != usual for n in names]
    return "; ".join([usual, *others])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    target = ROOT / "docs" / "configuration.md"
    target.write_text(page(), encoding="utf-8")
    print(f"wrote {target.relative_to(ROOT)}")
