"""Did it get better? Draws held-out prompts with the base model and with a LoRA, same seeds, and asks the oracle.

    python -m tiny.compare --lora output/demo/lora --output_dir output/demo

Writes `comparison.png` (base above tuned for prompts taken in order, not chosen), `scores.csv` and
`summary.txt` (win-rate with a 95% interval by bootstrap over prompts, ties counting half).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tiny import oracle, world

MODEL = Path(__file__).parent / "model"


def win_rate(base: np.ndarray, tuned: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """(share of prompts where tuned scores higher, ties half; lower and upper end of its 95% bootstrap interval)."""
    wins = np.where(tuned > base, 1.0, np.where(tuned == base, 0.5, 0.0))
    draws = np.random.default_rng(seed).integers(len(wins), size=(resamples, len(wins)))
    low, high = np.quantile(wins[draws].mean(1), [0.025, 0.975])
    return float(wins.mean()), float(low), float(high)


@torch.no_grad()
def draw(pipe: Any, prompts: list[str], label: str, steps: int, guidance: float, batch_size: int = 32) -> list:
    """One PIL image per prompt; image i has seed i, whatever the model."""
    images = []
    for i in tqdm(range(0, len(prompts), batch_size), desc=label):
        part = prompts[i : i + batch_size]
        generators = [torch.Generator().manual_seed(i + j) for j in range(len(part))]
        images += pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, required=True, help="folder with pytorch_lora_weights.safetensors")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=176, help="how many held-out prompts")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps (DDIM)")
    parser.add_argument("--guidance", type=float, default=3.0)
    args = parser.parse_args()
    if not (args.lora / "pytorch_lora_weights.safetensors").is_file():
        parser.error(f"--lora: no pytorch_lora_weights.safetensors in {args.lora}")

    import diffusers
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from ncp.training import grid

    diffusers.utils.logging.disable_progress_bar()

    held_out = [s.prompt(t) for t in range(len(world.TEMPLATES)) for s in world.split_scenes()[1]][: args.prompts]
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None, requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    images = {"base": draw(pipe, held_out, "base", args.steps, args.guidance)}
    pipe.load_lora_weights(args.lora)
    images["tuned"] = draw(pipe, held_out, "tuned", args.steps, args.guidance)
    scores = {name: oracle.score(drawn, held_out) for name, drawn in images.items()}

    args.output_dir.mkdir(parents=True, exist_ok=True)
    with open(args.output_dir / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", *(f"{name}_{q}" for name in scores for q in oracle.QUESTIONS)])
        for i, prompt in enumerate(held_out):
            writer.writerow([prompt, *(f"{scores[n][q][i]:.4f}" for n in scores for q in oracle.QUESTIONS)])
    lines = [
        f"{len(held_out)} held-out prompts, same seeds, guidance {args.guidance:g}, {args.steps} DDIM steps",
        "",
    ]
    lines.append(f"{'question':<10} {'base':>6} {'tuned':>6}   win-rate of tuned [95% interval]")
    for question in oracle.QUESTIONS:
        base, tuned = scores["base"][question], scores["tuned"][question]
        rate, low, high = win_rate(base, tuned)
        lines.append(f"{question:<10} {base.mean():>6.3f} {tuned.mean():>6.3f}   {rate:.1%} [{low:.1%}, {high:.1%}]")
    lines += ["", f"picture: {args.output_dir / 'comparison.png'}"]
    (args.output_dir / "summary.txt").write_text("\n".join(lines) + "\n")
    columns = 12
    picture = grid({name: drawn[:columns] for name, drawn in images.items()}, held_out[:columns], cell=96)
    picture.save(args.output_dir / "comparison.png")


if __name__ == "__main__":
    main()
