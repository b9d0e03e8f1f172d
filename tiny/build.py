"""Builds the embedded default: a trained tiny Stable Diffusion and a preference dataset drawn from it.

You do not need to run this: its output is in the repository (`tiny/model`, `tiny/data`).

    python -m tiny.build            all four stages, in float32, into tiny/work, then tiny/model and tiny/data
    python -m tiny.build STAGE      one of them, from the output of the stages before it

    vae            autoencoder, 64x64 pixels <-> 4x16x16 latents
    unet-1         text encoder and U-Net, trained together on latents: colours
    unet-2         the same, continued: shapes
    preferences    on-policy samples, judged by simulated annotators (tiny/preferences.py)

Each stage is deterministic for a given machine and number of threads. The base model is made so that it can be
improved: a twentieth of its captions have one wrong word, and in most of its training images the object is small, off
centre, textured or uneven, which the annotators do not like.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tiny import world
from tiny.preferences import MODEL, SEED, make_preferences

MAX_TOKENS = 16


# ---------------------------------------------------------------- autoencoder


def train_vae(work: Path, steps: int, batch_size: int = 32, lr: float = 2e-3) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIDE,
    )
    pixels, _ = scenes_and_pixels(20_000, SEED)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(SEED)
    log = Log("vae", steps)
    for _ in range(steps):
        index = torch.randint(len(pixels), (batch_size,), generator=generator)
        x = pixels[index].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        difference = vae.decode(posterior.sample(generator)).sample - x
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = difference.abs().mean() + 2 * difference.square().mean() + 3e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log(loss=loss, l1=difference.abs().mean(), kl=kl)
    vae.eval()
    latents = encode_all(vae, pixels[:2000])[0]
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    print(f"latent mean {latents.mean():.3f}, std {latents.std():.3f}")
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def encode_all(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of the posterior of uint8 images (N, 3, 64, 64), each (N, 4, 16, 16) float32, unscaled."""
    parts = [vae.encode(p.float() / 127.5 - 1).latent_dist for p in tqdm(pixels.split(100), desc="encode")]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


# ------------------------------------------------------ text encoder and U-Net


def make_tokenizer():
    """A CLIP tokenizer whose merges make each word of the world one token; any other text still encodes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = {
        w
        for s in world.all_scenes()
        for t in range(len(world.TEMPLATES))
        for w in s.prompt(t).replace(",", " ,").split()
    }
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(sorted(words) * 2, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS)


def new_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        # As in SDXL, no attention at full resolution: on a CPU it would cost more than everything else.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 96, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(1, 3, 4),  # diffusers' name for the number of heads: 32 channels each
        norm_num_groups=16,
    )


def train_unet(work: Path, phase: int, images: int = 30_000, batch_size: int = 64, lr: float = 1e-3) -> None:
    """Trains one of two phases, each with its own optimizer and one-cycle schedule. Phase 2 starts from 1's average.

    1: the noise error weighted like an error of v, which emphasises high noise, where colours are decided.
    2: min-SNR weights, which for Stable Diffusion's betas are uniform from t = 150 on: shapes and textures.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextModel

    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    tokenizer = make_tokenizer()
    steps = {1: 1700, 2: 2700}[phase]
    if phase == 1:
        text_encoder, unet = new_text_encoder(tokenizer), new_unet()
    else:
        before = work / f"model-phase-{phase - 1}"
        text_encoder = CLIPTextModel.from_pretrained(before / "text_encoder")
        unet = UNet2DConditionModel.from_pretrained(before / "unet")
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pixels, scenes = scenes_and_pixels(images, SEED + phase)
    mean, std = encode_all(vae, pixels)
    mean, std = mean * vae.config.scaling_factor, std * vae.config.scaling_factor
    rng = np.random.default_rng(SEED + 1 + phase)
    prompts = []
    for scene in scenes:
        said = world.with_wrong_word(scene, rng) if rng.random() < 0.05 else scene
        prompts.append("" if rng.random() < 0.1 else said.prompt(int(rng.integers(len(world.TEMPLATES)))))
    ids = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids

    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).train()
    ema = EMAModel(both.parameters(), decay=0.997)
    optimizer = torch.optim.AdamW(both.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(SEED)
    abar = scheduler.alphas_cumprod
    snr = abar / (1 - abar)
    weights = (1 / abar).clamp_max(60) if phase == 1 else (5 / snr).clamp_max(1)
    log = Log(f"unet-{phase}", steps)
    for _ in range(steps):
        i = torch.randint(images, (batch_size,), generator=generator)
        x0 = mean[i] + std[i] * torch.randn(mean[i].shape, generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (batch_size,), generator=generator)
        prediction = unet(scheduler.add_noise(x0, eps, t), t, text_encoder(ids[i])[0]).sample
        loss = (weights[t].view(-1, 1, 1, 1) * (prediction - eps) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(both.parameters())
        log(loss=loss)
        if log.step % 400 == 0 or log.step == steps:
            ema.store(both.parameters())
            ema.copy_to(both.parameters())
            pipe = StableDiffusionPipeline(
                vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
            )
            both.eval()
            # Half precision halves the files. The text encoder stays float32: transformers would load it in half
            # precision, while diffusers converts to float32.
            pipe.to(torch.float16).text_encoder.float()
            pipe.save_pretrained(work / f"model-phase-{phase}")
            pipe.to(torch.float32)
            both.train()
            ema.restore(both.parameters())
    if phase == 2:
        shutil.copytree(work / "model-phase-2", MODEL, dirs_exist_ok=True)
        for config in MODEL.glob("*/config.json"):  # removes the local path of the part
            lines = config.read_text().splitlines(keepends=True)
            config.write_text("".join(line for line in lines if '"_name_or_path"' not in line))


def scenes_and_pixels(n: int, seed: int) -> tuple[torch.Tensor, list[world.Scene]]:
    """n rendered scenes: (pixels (n, 3, 64, 64) uint8, scenes)."""
    rng = np.random.default_rng(seed)
    every = world.all_scenes()
    scenes = [every[i] for i in rng.integers(len(every), size=n)]
    pixels = np.stack([(world.render(s, rng) * 255).round().astype(np.uint8) for s in tqdm(scenes, desc="render")])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), scenes


class Log:
    """A progress bar with running means, and a line every 100 steps for a log file."""

    def __init__(self, name: str, steps: int):
        self.name, self.step, self.start = name, 0, time.time()
        self.mean: dict[str, float] = {}
        self.bar = tqdm(total=steps, desc=name)

    def __call__(self, **values: torch.Tensor) -> None:
        self.step += 1
        self.bar.update()
        for key, value in values.items():
            self.mean[key] = 0.98 * self.mean.get(key, value.item()) + 0.02 * value.item()
        if self.step % 100 == 0:
            figures = ", ".join(f"{k} {v:.4f}" for k, v in self.mean.items())
            tqdm.write(f"{self.name} step {self.step}: {figures}, {time.time() - self.start:.0f} s")


STAGES = ("vae", "unet-1", "unet-2", "preferences")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=STAGES, help="one stage; without it, all of them in turn")
    parser.add_argument("--work_dir", type=Path, default=MODEL.parent / "work", help="where intermediate models go")
    parser.add_argument("--vae_steps", type=int, default=1000)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for stage in [args.stage] if args.stage else STAGES:
        if stage == "vae":
            train_vae(args.work_dir, args.vae_steps)
        elif stage == "preferences":
            make_preferences()
        else:
            train_unet(args.work_dir, phase=int(stage[-1]))


if __name__ == "__main__":
    main()
