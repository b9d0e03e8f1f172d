"""Accuracy of half precision at full size: loss and LoRA gradient of a step, against the same step in float32.

    python benchmarks/full_precision.py sd15 sdxl --json precision.json    # on a GPU

U-Nets of the published shapes with random weights (architectures.py), random latents and conditions, steps of NCP-SFT
and NCP-DPO with two pairs, `secant: auto`. tiny.precision runs the same steps on small U-Nets, there against
an independent float64 implementation. In float32 the steps agree with it, so float32 is the reference here.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import architectures
import torch
import torch.nn.functional as F

from tiny.precision import DEVICE, NAMES, OBJECTIVES, Outcome, Setting, measured, setting

TIMESTEPS = ((20, 250), (550, 900))  # of two pairs
PAIRS = 2


def full_size(model: str) -> Setting:
    """The U-Net on the device, in float32. lora_std: as tiny.precision's random U-Nets."""
    if model == "tiny":
        return setting("embedded", PAIRS)
    description, generator = architectures.description(model), torch.Generator().manual_seed(3)
    side = {"sd15": 64, "sdxl": 128}[model]
    x0 = F.interpolate(torch.randn(2 * PAIRS, 4, side // 4, side // 4, generator=generator), size=side, mode="bicubic")
    text = torch.randn(PAIRS, *description.text_shape, generator=generator)
    conditions: dict[str, Any] = {"encoder_hidden_states": text.repeat(2, 1, 1)}
    if description.pooled_dim:
        size = torch.tensor([[8.0 * side, 8 * side, 0, 0, 8 * side, 8 * side]])
        pooled = torch.randn(PAIRS, description.pooled_dim, generator=generator)
        conditions["added_cond_kwargs"] = {"text_embeds": pooled.repeat(2, 1), "time_ids": size.repeat(2 * PAIRS, 1)}
    torch.manual_seed(0)
    return Setting(model, architectures.unet(model, torch.float32, DEVICE), x0, conditions, lora_std=0.02)


def compared(ours: Outcome, exact: Outcome) -> dict[str, float]:
    return {
        "loss_ratio": float(ours.distance.mean() / exact.distance.mean()),
        "cosine": float(F.cosine_similarity(ours.gradient, exact.gradient, dim=0)),
        "norm_ratio": float(ours.gradient.norm() / exact.gradient.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=("tiny", *architectures.NAMES))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["sft", "dpo"])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| U-Net | objective | t | arithmetic | loss ratio | gradient cosine | norm ratio |\n" + "|---" * 7 + "|")
    for model in args.models:
        s = full_size(model)
        for objective in args.objectives:
            for t in TIMESTEPS[: 1 if model == "tiny" else None]:
                outcomes = {}
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    outcomes[dtype] = measured(s, objective, dtype, torch.tensor(t), gradient_checkpointing=True)
                    gc.collect()
                    torch.cuda.empty_cache()
                    if dtype == torch.float32:
                        continue
                    r = compared(outcomes[dtype], outcomes[torch.float32])
                    rows.append({"model": model, "objective": objective, "t": t, "arithmetic": NAMES[dtype], **r})
                    figures = f"{r['loss_ratio']:.3f} | {r['cosine']:.4f} | {r['norm_ratio']:.3f}"
                    print(f"| {model} | {objective} | {t} | {NAMES[dtype]} | {figures} |", flush=True)
                    if args.json:
                        args.json.write_text(json.dumps(rows, indent=1))
        del s
        gc.collect()


if __name__ == "__main__":
    main()
