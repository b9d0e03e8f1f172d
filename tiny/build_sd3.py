"""Builds the embedded default's second model: a tiny Stable Diffusion 3 of the same world, beside the U-Net one.

Its output, `tiny/model-sd3`, is not in the repository yet: it was never trained to the end. Tests use random weights.

    python -m tiny.build_sd3                  trains it into tiny/work, then copies it to tiny/model-sd3
    python -m tiny.build_sd3 --look FOLDER    draws the validation prompts with a pipeline, prints the oracle's scores

SD3's form throughout: a transformer over image and text tokens, trained with flow matching and logit-normal timesteps,
two CLIP encoders whose embeddings are padded to the transformer's width, and a VAE with a shift. There is no T5, and no
zeros in its place either: draw with max_sequence_length 0. (SD3's 256 zeros would take three quarters of the time.) The
VAE is that of `tiny/model`. Transformer and text encoders are trained together from scratch, on the same kind of scenes
and captions as `tiny/model`, with the same faults (tiny/build.py).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ncp import flow
from tiny import oracle, world
from tiny.build import MAX_TOKENS, Log, encode_all, make_tokenizer, scenes_and_pixels
from tiny.preferences import MODEL, SEED

MODEL_SD3 = MODEL.parent / "model-sd3"
WIDTHS = (96, 128)  # of the two text encoders
JOINT = 256  # of the transformer's text input: wider than both together, as in SD3


def new_text_encoder(tokenizer: Any, width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_transformer(layers: int = 8, heads: int = 4) -> Any:
    """64 image tokens of 2 x 2 latent pixels; eight blocks, so that a quarter, a half and three quarters exist."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=JOINT,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def embedded(encoders: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The transformer's conditions for token ids (B, S), as the pipeline computes them, with a gradient."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    text = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
    pooled = torch.cat([o.text_embeds for o in outputs], dim=-1)
    return {"encoder_hidden_states": F.pad(text, (0, JOINT - text.shape[-1])), "pooled_projections": pooled}


def captions(scenes: list[world.Scene], rng: np.random.Generator) -> list[str]:
    """As for the U-Net: a twentieth with a wrong word, a tenth empty."""
    prompts = []
    for scene in scenes:
        said = world.with_wrong_word(scene, rng) if rng.random() < 0.05 else scene
        prompts.append("" if rng.random() < 0.1 else said.prompt(int(rng.integers(len(world.TEMPLATES)))))
    return prompts


def train(
    work: Path, steps: int, images: int = 30_000, batch_size: int = 64, lr: float = 1e-3, save_steps: int = 500
) -> None:
    """Trains transformer and text encoders on the velocity, and writes work/model-sd3 every `save_steps`.

    With it goes work/model-sd3.state, from which the same call continues after an interruption.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(SEED)
    vae, tokenizer = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval(), make_tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # SD3's 3 is for 4,096 tokens
    pixels, scenes = scenes_and_pixels(images, SEED + 11)
    mean, std = encode_all(vae, pixels)
    vae.register_to_config(
        shift_factor=round(mean.mean().item(), 5), scaling_factor=round(1 / (mean + std).std().item(), 5)
    )
    mean = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    std = std * vae.config.scaling_factor
    rng = np.random.default_rng(SEED + 12)
    settings = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    ids = tokenizer(captions(scenes, rng), **settings).input_ids

    encoders = torch.nn.ModuleList([new_text_encoder(tokenizer, width) for width in WIDTHS])
    model = torch.nn.ModuleDict({"transformer": new_transformer(), "encoders": encoders}).train()
    ema = EMAModel(model.parameters(), decay=0.998)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(SEED)
    among = flow.timesteps(scheduler, 1)
    log, begun = Log("sd3", steps), work / "model-sd3.state"
    stateful = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    if begun.is_file():
        state = torch.load(begun, weights_only=True)
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        rng.bit_generator.state = state["rng"]
        log.bar.update(state["step"])
        log.step = state["step"]
    while log.step < steps:
        i = torch.randint(images, (batch_size,), generator=generator)
        x0 = mean[i] + std[i] * torch.randn(mean[i].shape, generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.tensor([flow.draw_timestep(scheduler, among, rng) for _ in range(batch_size)])
        x_t = flow.add_noise(scheduler, x0, eps, t)
        v = model["transformer"](x_t, timestep=t, **embedded(encoders, ids[i])).sample
        loss = (v - flow.target(x0, eps)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        log(loss=loss)
        if log.step % save_steps == 0 or log.step == steps:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            save(model.eval(), vae, tokenizer, scheduler, work / "model-sd3")
            model.float().train()
            ema.restore(model.parameters())
            state = {name: part.state_dict() for name, part in stateful.items()}
            state |= {"generator": generator.get_state(), "rng": rng.bit_generator.state, "step": log.step}
            torch.save(state, begun.with_suffix(".new"))
            begun.with_suffix(".new").replace(begun)


def save(model: Any, vae: Any, tokenizer: Any, scheduler: Any, folder: Path) -> None:
    """Writes the pipeline. Half precision halves the files; the text encoders stay float32, as in tiny/build.py."""
    from diffusers import StableDiffusion3Pipeline

    first, second = model["encoders"]
    pipe = StableDiffusion3Pipeline(
        transformer=model["transformer"].half(), scheduler=scheduler, vae=vae.half(), text_encoder=first,
        tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    vae.float()
    for config in folder.glob("*/config.json"):  # removes the local path of the part
        lines = config.read_text().splitlines(keepends=True)
        config.write_text("".join(line for line in lines if '"_name_or_path"' not in line))


@torch.no_grad()
def look(folder: Path, guidance: float = 3.0, steps: int = 20) -> dict[str, float]:
    """Draws each validation scene once, prints the oracle's mean scores, and saves the first pictures beside it."""
    from diffusers import StableDiffusion3Pipeline

    from ncp.training.drawing import grid

    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = [scene.prompt(n % len(world.TEMPLATES)) for n, scene in enumerate(world.split_scenes()[1])]
    images = []
    for i in range(0, len(prompts), 44):
        seeds = [torch.Generator().manual_seed(10**7 + n) for n in range(i, min(i + 44, len(prompts)))]
        keys = {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": 0}
        images += pipe(prompts[i : i + 44], height=world.SIDE, width=world.SIDE, generator=seeds, **keys).images
    means = {question: float(np.mean(values)) for question, values in oracle.score(images, prompts).items()}
    print(", ".join(f"{question} {mean:.3f}" for question, mean in means.items()))
    grid({"drawn": images[:12]}, prompts[:12]).save(folder.parent / f"{folder.name}.png")
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=MODEL.parent / "work", help="where the trained model goes")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--look", type=Path, help="only draw with this pipeline, and score what it draws")
    args = parser.parse_args()
    if args.look:
        look(args.look)
        return
    args.work_dir.mkdir(parents=True, exist_ok=True)
    train(args.work_dir, args.steps, args.images)
    look(args.work_dir / "model-sd3")
    shutil.copytree(args.work_dir / "model-sd3", MODEL_SD3, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
