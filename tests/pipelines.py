"""Tiny random pipelines and Pick-a-Pic parquet, made on the fly: for what the trained embedded one cannot show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

SIDE = 32  # pixels of a training image; latents are 16 x 16


def tokenizer() -> CLIPTokenizer:
    """Bytes as tokens: any text encodes."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def text_encoder(kind: type, hidden: int = 32):
    torch.manual_seed(1)
    return kind(
        CLIPTextConfig(
            vocab_size=514, hidden_size=hidden, intermediate_size=37, projection_dim=24, num_hidden_layers=2,
            num_attention_heads=4, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        )
    )  # fmt: skip


def unet(xl: bool = False, channels: tuple[int, ...] = (32, 64, 64)) -> UNet2DConditionModel:
    """Three down blocks, cross attention in the outer two; SDXL's text_time conditioning if `xl`."""
    torch.manual_seed(0)
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 * 6 + 24,
        }
        if xl
        else {}
    )
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=64 if xl else 32,
        attention_head_dim=4,
        norm_num_groups=8,
        **extra,
    )


def scheduler(**changes) -> DDPMScheduler:
    """Stable Diffusion's betas."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    }
    return DDPMScheduler(**{**settings, **changes})


def save_pipeline(folder: Path, xl: bool = False, **scheduler_changes) -> Path:
    """A complete random SD or SDXL pipeline folder."""
    torch.manual_seed(2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=SIDE,
        scaling_factor=0.5, force_upcast=xl,
    )  # fmt: skip
    parts = {"vae": vae, "unet": unet(xl), "scheduler": scheduler(**scheduler_changes), "tokenizer": tokenizer()}
    parts["text_encoder"] = text_encoder(CLIPTextModel)
    if xl:
        parts |= {"tokenizer_2": tokenizer(), "text_encoder_2": text_encoder(CLIPTextModelWithProjection)}
        pipe = StableDiffusionXLPipeline(**parts)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.save_pretrained(folder)
    return folder


def transformer(**changes) -> SD3Transformer2DModel:
    """SD3's transformer of eight blocks over 2 x 2 patches; the first two have a second attention, as in SD3.5."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 16, "patch_size": 2, "in_channels": 8, "out_channels": 8, "num_layers": 8,
        "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 80, "caption_projection_dim": 32,
        "pooled_projection_dim": 48, "pos_embed_max_size": 24, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
    }  # fmt: skip
    return SD3Transformer2DModel(**{**settings, **changes})


def save_sd3_pipeline(folder: Path, t5: bool = False, shift: float = 3.0) -> Path:
    """A complete random SD3 pipeline folder: 8 latent channels with a shift, two CLIP encoders, and T5 if wanted."""
    torch.manual_seed(2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), latent_channels=8, norm_num_groups=4, sample_size=SIDE,
        scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    parts = {"vae": vae, "transformer": transformer(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift)}
    for number, suffix in enumerate(("", "_2")):
        parts |= {f"tokenizer{suffix}": tokenizer(), f"text_encoder{suffix}": text_encoder(CLIPTextModelWithProjection)}
        torch.nn.init.normal_(parts[f"text_encoder{suffix}"].text_projection.weight, std=0.3 + number)
    torch.manual_seed(3)
    t5_config = T5Config(vocab_size=514, d_model=80, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    parts["text_encoder_3"] = T5EncoderModel(t5_config) if t5 else None
    parts["tokenizer_3"] = t5_tokenizer() if t5 else None
    StableDiffusion3Pipeline(**parts).save_pretrained(folder)
    return folder


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with T5's padding and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokens = ["<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def jpeg(seed: int, size: tuple[int, int] = (40, 36)) -> bytes:
    """A smooth random JPEG of (width, height)."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def save_dataset(file: Path, rows: int = 12, **columns) -> Path:
    """Pick-a-Pic rows in one parquet file: decisive, winners alternating sides, images of different sizes.

    Keyword arguments replace whole columns; None leaves a column out. best_image_uid follows from uids and labels.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    won = [float(i % 2 == 0) for i in range(rows)]
    content = {
        "are_different": [True] * rows,
        "caption": [f"prompt number {i}" for i in range(rows)],
        "has_label": [True] * rows,
        "image_0_uid": [f"a{i}" for i in range(rows)],
        "image_1_uid": [f"b{i}" for i in range(rows)],
        "jpg_0": [jpeg(2 * i, (40 + i, 36)) for i in range(rows)],
        "jpg_1": [jpeg(2 * i + 1, (33, 48 + i)) for i in range(rows)],
        "label_0": won,
        "label_1": [1 - w for w in won],
        "ranking_id": list(range(rows)),
        **columns,
    }
    sides = [content[c] for c in ("label_0", "image_0_uid", "image_1_uid")]
    if "best_image_uid" not in columns and all(isinstance(side, list) for side in sides):
        best = [{1.0: first, 0.0: second}.get(label, "") for label, first, second in zip(*sides, strict=True)]
        content["best_image_uid"] = [None if uid is None else str(uid) for uid in best]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: v for k, v in content.items() if v is not None}), file)
    return file
