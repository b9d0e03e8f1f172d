"""Tiny random models in the layouts in which people have them: the hub's repositories as they lie there, and one file.

Both are made from a pipeline that diffusers has just saved, so that what is loaded can be compared with it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from pipelines import SIDE, scheduler, text_encoder, tokenizer, unet
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

Tensors = dict[str, torch.Tensor]
# Of the configs in the hub's SD 1.5 and SDXL, written in 2022 and 2023: keys that were not there yet.
NEWER = {
    "unet": {"upcast_attention", "only_cross_attention", "dual_cross_attention", "use_linear_projection",
             "class_embed_type", "num_class_embeds", "resnet_time_scale_shift", "time_cond_proj_dim",
             "encoder_hid_dim_type", "reverse_transformer_layers_per_block", "attention_type", "dropout"},
    "vae": {"force_upcast", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "use_quant_conv",
            "use_post_quant_conv", "mid_block_add_attention"},
}  # fmt: skip


def build(xl: bool) -> Any:
    """A complete random pipeline whose two text encoders, of SDXL, differ in width, as the published ones do."""
    torch.manual_seed(2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=SIDE,
    )  # fmt: skip
    parts = {"vae": vae, "unet": unet(xl), "scheduler": scheduler(), "tokenizer": tokenizer()}
    parts["text_encoder"] = text_encoder(CLIPTextModel, 24 if xl else 32)
    if xl:
        second = text_encoder(CLIPTextModelWithProjection, 40)
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer(), text_encoder_2=second)
    none = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)


# ---------------------------------------------------------------- as on the hub


def save_as_on_hub(pipe: Any, folder: Path, kinds: tuple[str, ...] = ("", "fp16")) -> Path:
    """A folder with the files, names and contents that stabilityai's SDXL and runwayml's SD 1.5 have.

    kinds: which weights there are: "" full precision, "fp16" that variant, "bin" pickles in full precision.
    """
    pipe.save_pretrained(folder)
    xl = isinstance(pipe, StableDiffusionXLPipeline)
    index = json.loads((folder / "model_index.json").read_text())
    if not xl:
        index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
                  "feature_extractor": ["transformers", "CLIPFeatureExtractor"]}  # fmt: skip
        index.pop("requires_safety_checker")
        for part, file in (("safety_checker", "config.json"), ("feature_extractor", "preprocessor_config.json")):
            (folder / part).mkdir()
            (folder / part / file).write_text("{}")
        (folder / "safety_checker" / "model.safetensors").write_bytes(b"not read")
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler" if xl else "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps({**index, "_diffusers_version": "0.6.0"}))
    stated = {"_class_name": index["scheduler"][1], "_diffusers_version": "0.6.0", "beta_start": 0.00085}
    stated |= {"beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1}
    stated |= {"set_alpha_to_one": False, "skip_prk_steps": True, "trained_betas": None, "clip_sample": False}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(stated))
    for part, keys in NEWER.items():
        config = json.loads((folder / part / "config.json").read_text())
        kept = {
            k: v for k, v in config.items() if k not in keys - ({"force_upcast", "scaling_factor"} if xl else set())
        }
        (folder / part / "config.json").write_text(json.dumps(kept))
    texts = ("text_encoder", "text_encoder_2")[: 1 + xl]
    for part in texts:
        _old_tokenizer(folder / part.replace("text_encoder", "tokenizer"))
    for part in ("unet", "vae", *texts):
        _write_weights(folder / part, part, kinds)
    save_file({"x": torch.zeros(1)}, folder / ("sd_xl_base_1.0.safetensors" if xl else "v1-5-pruned.safetensors"))
    return folder


def _write_weights(folder: Path, part: str, kinds: tuple[str, ...]) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    if part == "vae":  # before attention had one name in all models
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = {re.sub(r"to_[qkv]|to_out\.0", lambda m: old[m[0]], k): v for k, v in tensors.items()}
        assert sum("proj_attn" in k for k in tensors) == 4
    if part.startswith("text_encoder"):
        names = {k.removeprefix("text_model."): v for k, v in tensors.items()}
        tensors = {k if k.startswith("text_projection") else f"text_model.{k}": v for k, v in names.items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    base = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    for kind in kinds:
        if kind == "bin":
            torch.save(tensors, folder / f"{'pytorch_model' if base == 'model' else base}.bin")
        elif kind == "":
            save_file(tensors, folder / f"{base}.safetensors", {"format": "pt"})
        else:
            half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
            save_file(half, folder / f"{base}.{kind}.safetensors", {"format": "pt"})
    if kinds == ("", "fp16") and part == "unet":
        shutil.copy(folder / f"{base}.safetensors", folder / f"{base}.non_ema.safetensors")


def _old_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt and two settings files, as before tokenizers had one file."""
    content = json.loads((folder / "tokenizer.json").read_text())
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    second = folder.name.endswith("_2")
    pad = "!" if second else "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad}))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **special, "errors": "replace"}))


# ---------------------------------------------------------------- one file


def single_file(pipe: Any, open_clip: bool = False) -> Tensors:
    """The tensors of a pipeline under the names of the first Stable Diffusion code. open_clip: of SD 2.x."""
    xl = isinstance(pipe, StableDiffusionXLPipeline)
    tensors = {f"model.diffusion_model.{k}": v for k, v in ldm_unet(pipe.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in ldm_vae(pipe.vae).items()}
    clip = {f"text_model.{k}": v for k, v in _text_model(pipe.text_encoder).items()}
    clip["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if xl:
        tensors |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in clip.items()}
        second = {**ldm_open_clip(pipe.text_encoder_2), "logit_scale": torch.tensor(4.6)}
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
    elif open_clip:
        tensors |= {f"cond_stage_model.model.{k}": v for k, v in ldm_open_clip(pipe.text_encoder).items()}
    else:
        tensors |= {f"cond_stage_model.transformer.{k}": v for k, v in clip.items()}
    tensors["alphas_cumprod"] = pipe.scheduler.alphas_cumprod
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}


def ldm_unet(model: Any) -> Tensors:
    """LDM counts a U-Net's layers through: input_blocks.N.M, middle_block.M, output_blocks.N.M."""
    layers = model.config.layers_per_block
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    resnet |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    fixed = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_norm_out": "out.0"}
    fixed |= {"time_embedding.linear_2": "time_embed.2", "conv_out": "out.2"}
    fixed |= {f"add_embedding.linear_{n}": f"label_emb.0.{2 * n - 2}" for n in (1, 2)}

    def rename(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in fixed:
            return f"{fixed[stem]}.{kind}"
        if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
            part, number, rest = found.groups()
            place = f"middle_block.{2 * int(number) + (part == 'attentions')}"
        else:
            side, block, part, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()
            count = layers + 1
            if part == "downsamplers":
                return f"input_blocks.{1 + int(block) * count + layers}.0.op.{kind}"
            index = int(block) * count + int(number) + (side == "down")
            if part == "upsamplers":
                attends = hasattr(model.up_blocks[int(block)], "attentions")
                return f"output_blocks.{int(block) * count + layers}.{1 + attends}.conv.{kind}"
            place = f"{'input' if side == 'down' else 'output'}_blocks.{index}.{int(part == 'attentions')}"
        if part == "resnets":
            rest = re.sub(r"^\w+", lambda m: resnet[m[0]], rest)
        return f"{place}.{rest}"

    return {rename(k): v for k, v in model.state_dict().items()}


def ldm_vae(model: Any) -> Tensors:
    last = len(model.config.block_out_channels) - 1
    renamed = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{last - int(m[1])}", name).replace("down_blocks", "down")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = (
            name.replace("resnets", "block")
            .replace("conv_shortcut", "nin_shortcut")
            .replace("conv_norm_out", "norm_out")
        )
        name = re.sub(r"(down|up)samplers\.0\.", r"\1sample.", name)
        if "attentions" in name:
            for new, old in {"group_norm": "norm", "to_out.0": "proj_out", "to_": ""}.items():
                name = name.replace(new, old)
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            value = value[:, :, None, None] if value.ndim == 2 else value  # a convolution of one pixel
        renamed[name] = value
    return renamed


def ldm_open_clip(model: Any) -> Tensors:
    """A CLIP text model as OpenCLIP names it: query, key and value in one matrix."""
    renames = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    renamed = {}
    text = _text_model(model)
    for name, value in text.items():
        name = name.removeprefix("encoder.").replace("layers.", "transformer.resblocks.")
        for new, old in renames.items():
            name = name.replace(new, old)
        if found := re.fullmatch(r"(.+)\.self_attn\.q_proj\.(weight|bias)", name):
            source = f"encoder.{found[1].replace('transformer.resblocks.', 'layers.')}.self_attn"
            three = [text[f"{source}.{p}_proj.{found[2]}"] for p in "qkv"]
            renamed[f"{found[1]}.attn.in_proj_{found[2]}"] = torch.cat(three)
        elif ".self_attn.out_proj" in name:
            renamed[name.replace("self_attn", "attn")] = value
        elif ".self_attn." not in name:
            name = name.replace("embeddings.token_embedding", "token_embedding")
            name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
            renamed[name.replace("final_layer_norm", "ln_final")] = value
    if hasattr(model, "text_projection"):
        renamed["text_projection"] = model.text_projection.weight.T
    return renamed


def _text_model(model: Any) -> Tensors:
    state = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if not k.startswith("text_projection") and "position_ids" not in k}
