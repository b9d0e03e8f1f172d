"""Images drawn by a model, and grids of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from ncp.training.inputs import images_per_pass
from ncp.training.models import Models


@torch.no_grad()
def draw(
    models: Models,
    pipe: Any,
    unet: torch.nn.Module,
    prompts: list[str],
    seeds: list[int],
    *,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    accelerator: Accelerator,
    batch_size: int = 8,
    between: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """One image per prompt (DDIM; SD3: Euler), each from its own seed, so that it does not depend on the other prompts.

    pipe: from `load_pipe`. unet: the policy or the reference. between: called between sampler steps; it may raise an
    exception to stop the drawing.
    """

    def after_step(pipe: Any, step: int, timestep: int, outputs: dict[str, Any]) -> dict[str, Any]:
        between()
        return outputs

    vae, description = pipe.vae, models.description
    family = description.family
    sampler = family.sampler(description.scheduler)
    pipe = family.rebuilt(pipe, **{family.DENOISER: unet, "scheduler": sampler})
    pipe.set_progress_bar_config(disable=True)
    training, images = unet.training, []
    unet.eval()
    for i in range(0, len(prompts), batch_size):
        with accelerator.autocast():
            latents = pipe(
                prompts[i : i + batch_size],
                height=resolution,
                width=resolution,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(s) for s in seeds[i : i + batch_size]],
                output_type="latent",
                callback_on_step_end=after_step,
                **family.draw_arguments(description.max_sequence_length),
            ).images
        images += decode_latents(vae, latents)  # outside autocast: a VAE that needs float32 gets it
    unet.train(training)
    return images


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    """Images from scaled latents (N, C, h, w), decoded in the VAE's dtype and in passes of bounded size."""
    z = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    side = max(z.shape[-2:]) * 2 ** (len(vae.config.block_out_channels) - 1)
    pictures = []
    for part in z.split(images_per_pass(vae.config, side)):
        pictures += VaeImageProcessor().postprocess(vae.decode(part).sample.float(), output_type="pil")
    return pictures


def grid(rows: dict[str, list[Image.Image]], prompts: list[str], cell: int = 160) -> Image.Image:
    """Labelled rows of images, one column per prompt, with the prompt above its column."""
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
    return textwrap.wrap(text, max(8, width), max_lines=most, placeholder=" ...") or [""]
