"""Checks the exported LoRA file in a second implementation: does stable-diffusion.cpp apply it as diffusers does?

    pip install stable-diffusion-cpp-python
    python benchmarks/sd_cpp.py /tmp/sd-cpp

Makes a Stable Diffusion 1.5 of full size with random weights, as a diffusers folder and as one file in the layout of
the original checkpoints, and a random LoRA whose alpha is half its rank. export_lora.py writes the LoRA file. Both
programs draw an image from the same noise, with and without the LoRA. The script compares the change of the image in
the two programs, and prints the correlation and the slope of stable-diffusion.cpp's change over diffusers'. The slope
is 1 if stable-diffusion.cpp has read alpha. docs/bring-your-own.md has the results.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import architectures
import diffusers
import numpy as np
import torch
import transformers
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import export_lora
from ncp.training.unets import LORA_TARGETS

SIDE, STEPS, SEED = 128, 4, 7  # with four steps both programs use the timesteps 999, 666, 333, 0
RANK, ALPHA = 8, 4.0
PROMPT = "a photo of a cat"
TOKENS = [49406, 320, 1125, 539, 320, 2368]  # of this prompt in CLIP's vocabulary, then 49407; no tokenizer is needed
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
VAE = {
    "conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut",
}  # fmt: skip


def original_unet_name(name: str) -> str:
    """A weight's name in SD 1.5's original U-Net. name: diffusers'."""
    block = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)", name)
    if block:
        level, kind, i = int(block[2]), block[3], int(block[4])
        number = (
            3 * level + (2 if kind == "upsamplers" else i) + (block[1] == "down") * (3 if "samplers" in kind else 1)
        )
        last = {"resnets": "0", "attentions": "1", "downsamplers": "0.op", "upsamplers": f"{2 if level else 1}.conv"}
        side = "input" if block[1] == "down" else "output"
        rest = name[block.end() :].replace(".conv.", ".", 1) if "samplers" in kind else name[block.end() :]
        name = f"{side}_blocks.{number}.{last[kind]}{rest}"
        is_resnet = kind == "resnets"
    else:
        is_resnet = "resnets" in name
        for theirs, original in UNET.items():
            name = re.sub(rf"^{re.escape(theirs)}\.", f"{original}.", name)
    for theirs, original in RESNET.items() if is_resnet else ():
        name = name.replace(f".{theirs}.", f".{original}.")
    return f"model.diffusion_model.{name}"


def original_vae_name(name: str) -> str:
    """A weight's name in SD 1.5's original VAE. name: diffusers'."""
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    for theirs, original in VAE.items():
        name = name.replace(f".{theirs}.", f".{original}.")
    return f"first_stage_model.{name}"


def original_checkpoint(pipe: Any) -> dict[str, torch.Tensor]:
    """The pipeline's weights under the names and shapes of the original single-file layout."""
    found = {original_unet_name(k): v for k, v in pipe.unet.state_dict().items()}
    for name, weight in pipe.vae.state_dict().items():
        is_projection = "attentions" in name and weight.dim() == 2  # a convolution in the original layout
        found[original_vae_name(name)] = weight[:, :, None, None] if is_projection else weight
    for name, weight in pipe.text_encoder.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    return {k: v.contiguous() for k, v in found.items()}


def make(folder: Path) -> None:
    """Writes the base model in both layouts (float16 values stored in float32), and the LoRA with its file."""
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    pipe = architectures.pipe("sd15", torch.float32, torch.float32, cpu)
    pipe.register_modules(unet=architectures.unet("sd15", torch.float32, cpu))
    with torch.no_grad():
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            for weight in module.parameters():
                weight.copy_(weight.half())
        pipe.vae.decoder.conv_out.weight.mul_(2)  # a random decoder has little contrast
    pipe.save_pretrained(folder / "base")
    save_file(original_checkpoint(pipe), folder / "base.safetensors", {"format": "pt"})
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LORA_TARGETS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.1 if "lora_A" in name else 0.2))
    StableDiffusionPipeline.save_lora_weights(
        folder / "lora",
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    export_lora.main(["--lora", str(folder / "lora"), "--output", str(folder / "kohya.safetensors")])


def by_diffusers(folder: Path, lora: Path | None) -> np.ndarray:
    """The image (H, W, 3), 0 to 255."""
    pipe = StableDiffusionPipeline.from_pretrained(folder / "base", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="linspace", steps_offset=0
    )
    if lora:
        pipe.load_lora_weights(lora)
    ids = torch.tensor([TOKENS + [49407] * (77 - len(TOKENS))])
    text = pipe.text_encoder(ids)[0]
    noise = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        image = pipe(
            prompt_embeds=text, latents=noise, guidance_scale=1, num_inference_steps=STEPS, output_type="np"
        ).images[0]
    return np.round(image * 255)


def by_sd_cpp(folder: Path, lora: Path | None) -> np.ndarray:
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(
        model_path=str(folder / "base.safetensors"), rng_type="cpu", sampler_rng_type="cpu", wtype="f32", n_threads=1,
        verbose=False,
    )  # fmt: skip
    (image,) = model.generate_image(
        prompt=PROMPT + (f"<lora:{lora}:1>" if lora else ""), width=SIDE, height=SIDE, cfg_scale=1, seed=SEED,
        sample_steps=STEPS, sample_method="euler", scheduler="discrete",
    )  # fmt: skip
    return np.asarray(image.convert("RGB")).astype(float)


def main() -> None:
    folder = Path(sys.argv[1])
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "kohya.safetensors").is_file():
        make(folder)
    kohya, own = folder / "kohya.safetensors", folder / "lora" / "pytorch_lora_weights.safetensors"
    base = by_diffusers(folder, None)
    print(
        f"diffusers, kohya's file against its own: {abs(by_diffusers(folder, kohya) - by_diffusers(folder, own)).max()}"
    )
    theirs = by_sd_cpp(folder, None)
    print(f"base, the two programs: mean difference {abs(theirs - base).mean():.2f} of 255, "
          f"correlation {np.corrcoef(theirs.ravel(), base.ravel())[0, 1]:.4f}")  # fmt: skip
    change = by_diffusers(folder, own) - base
    weights = {k: v for k, v in load_file(kohya).items() if not k.endswith(".alpha")}
    save_file(weights, folder / "no-alpha.safetensors")
    for name, lora in (("as written", kohya), ("its alphas taken out", folder / "no-alpha.safetensors")):
        their_change = by_sd_cpp(folder, lora) - theirs
        slope = (change * their_change).sum() / (change**2).sum()
        correlation = np.corrcoef(change.ravel(), their_change.ravel())[0, 1]
        means = f"mean {abs(change).mean():.2f} of 255 by diffusers, {abs(their_change).mean():.2f} by sd.cpp"
        print(f"change by the LoRA, {name}: {means}; correlation {correlation:.4f}, slope {slope:.4f}")


if __name__ == "__main__":
    main()
