"""Checkpoints in one .safetensors file, in the layout of the original Stable Diffusion code ("LDM"), as on Civitai.

Such a file holds U-Net, VAE and text encoders, but no configs and no tokenizers. The configs of SD 1.x, SD 2.x and SDXL
are in ncp/training/architectures, copied from the hub's repositories. CLIP's tokenizer is downloaded from the hub once.
Alternatively `single_file_config` names a diffusers pipeline folder to take both from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTokenizer

from ncp.common import hub
from ncp.common.errors import UserError
from ncp.common.files import sampled_sha256

ARCHITECTURES = Path(__file__).parent / "architectures"
TOKENIZER = "openai/clip-vit-large-patch14"  # of SD 1.x; those of SD 2.x and SDXL differ in how they pad
UNET = "model.diffusion_model."
# Prefixes of an architecture's parts in a file.
PREFIXES = {
    "sd1": {"unet": UNET, "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."},
    "sd2": {"unet": UNET, "vae": "first_stage_model.", "text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "unet": UNET,
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")
# Patterns in file names.
V_PREDICTION = re.compile(r"v[-_ ]?pred", re.IGNORECASE)
ZERO_SNR = re.compile(r"z(t|ero)?[-_ ]?(terminal)?[-_ ]?snr|noob", re.IGNORECASE)


def is_single_file(name: str) -> bool:
    """Whether a model's name is a file rather than a folder or a hub id."""
    return Path(name).is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether a .safetensors file holds a U-Net as such checkpoints do. Raises UserError if the file is damaged."""
    return any(name.startswith(UNET) for name in read_header(path))


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name to dtype, shape and data_offsets. Raises UserError if it is no safetensors file, or truncated."""
    return _read_header(path, path.stat().st_size, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read_header(path: Path, size: int, changed: int) -> dict[str, dict[str, Any]]:
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a .safetensors file; others are pickles, which run code when they are read")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a .safetensors file, or damaged ({error})") from None
    if end != size:
        raise UserError(f"{path} is damaged: {size:,} bytes of {end:,}")
    return header


def architecture(path: Path) -> str:
    """sd1, sd2 or sdxl, recognised by a file's tensors. Raises UserError for a file that the method cannot use.

    Names of tensors as in diffusers' loaders/single_file_utils.py (CHECKPOINT_KEY_NAMES) and ComfyUI's
    comfy/supported_models.py.
    """
    header = read_header(path)
    if (first := header.get(f"{UNET}input_blocks.0.0.weight")) is None:
        if any(name.startswith(f"{UNET}joint_blocks.") for name in header):
            raise UserError(f"{path} is Stable Diffusion 3 in one file; expected a diffusers pipeline folder of it")
        if any(".lora_" in name or name.startswith("lora_") for name in header):
            raise UserError(f"{path} is a LoRA; name the checkpoint that it belongs to")
        raise UserError(f"{path} holds no U-Net of Stable Diffusion ({UNET}...); expected a whole SD 1.x, 2.x or SDXL")
    if (channels := first["shape"][1]) != 4:
        kind = {9: "an inpainting model", 8: "a model that edits images"}.get(channels, "a model with extra inputs")
        raise UserError(f"{path}: its U-Net takes {channels} channels, so it is {kind}, which is not supported")
    if "edm_mean" in header or "edm_vpred.sigma_max" in header:
        raise UserError(f"{path}: trained with EDM's noise levels (Playground 2.5, CosXL); the method needs DDPM's")
    found = {prefix for p in PREFIXES.values() for prefix in p.values() if any(n.startswith(prefix) for n in header)}
    if f"{UNET}label_emb.0.0.weight" in header:
        if any(name.startswith("conditioner.embedders.0.model.") for name in header):
            raise UserError(f"{path} is SDXL's refiner, which finishes another model's images; fine-tune the base")
        kind = "sdxl"
    else:
        kind = "sd2" if PREFIXES["sd2"]["text_encoder"] in found else "sd1"
    if missing := [p for p, prefix in PREFIXES[kind].items() if prefix not in found and p != "vae"]:
        raise UserError(f"{path}: the file has no {', '.join(missing)}; expected a whole checkpoint")
    return kind


def configs_of(path: Path, given: str | None) -> Path:
    """The folder of a file's configs, in the layout of a diffusers pipeline. Raises UserError if it cannot be found.

    given: `single_file_config`, here and in the functions below.
    """
    kind = architecture(path)
    if given is None:
        return ARCHITECTURES / kind
    folder = Path(given) if Path(given).is_dir() else hub.configs_of(given)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"single_file_config: {given} has no model_index.json; expected a diffusers pipeline")
    return folder


def read_json(path: Path, given: str | None, file: str) -> dict[str, Any]:
    """A JSON file of this checkpoint's pipeline. Raises UserError if it is missing or is not a JSON object.

    In the scheduler's config, `prediction_type` and `rescale_betas_zero_snr` come from the checkpoint, if it states
    them.
    """
    source = configs_of(path, given) / file
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"single_file_config: {source} is not readable as JSON ({error})") from None
    return content | stated(path)[0] if file == "scheduler/scheduler_config.json" else content


def stated(path: Path) -> tuple[dict[str, Any], str]:
    """(prediction_type and rescale_betas_zero_snr as far as a checkpoint states them, the source of that).

    The source is the tensors v_pred and ztsnr, which ComfyUI's comfy/supported_models.py reads too, or the file's name:
    "vpred" and similar, with zero terminal SNR if it contains "ztsnr" or is NoobAI's. The two kinds of SD 2.x have the
    same tensors; there the names of the published files decide: 768 is v_prediction, 512 and base are epsilon.
    """
    header, name = read_header(path), path.stem
    if "v_pred" in header:
        zero = "ztsnr" in header
        said = "as the file's tensors v_pred and ztsnr say" if zero else "as the file's tensor v_pred says"
        return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero}, said
    if V_PREDICTION.search(name):
        zero = ZERO_SNR.search(name) is not None
        return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero}, "by the file's name"
    if architecture(path) == "sd2" and (found := re.search(r"768|512|base", name, re.IGNORECASE)):
        return {"prediction_type": "v_prediction" if found[0] == "768" else "epsilon"}, "by the file's name"
    return {}, ""


def identity(path: Path, given: str | None, part: str) -> str:
    """Identifies a part by its content: a sample of each tensor, or a tokenizer's files and settings."""
    digest = hashlib.sha256()
    if part.startswith("tokenizer"):
        folder, settings = tokenizer_of(path, given, part)
        digest.update(json.dumps(settings).encode())
        digest.update(sampled_sha256(f for f in folder.iterdir() if f.name in TOKENIZER_FILES).encode())
        return digest.hexdigest()[:16]
    header, prefix = read_header(path), PREFIXES[architecture(path)][part]
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for name in sorted(n for n in header if n.startswith(prefix)):
            entry = header[name]
            digest.update(f"{name} {entry['dtype']} {entry['shape']} ".encode())
            first, last = entry["data_offsets"]
            file.seek(start + first)
            digest.update(file.read(min(last - first, 4096)))
    return digest.hexdigest()[:16]


def tokenizer_of(path: Path, given: str | None, part: str) -> tuple[Path, dict[str, Any]]:
    """(folder of the files of `tokenizer` or `tokenizer_2`, its padding settings).

    The files are beside the configs, or else the hub's CLIP tokenizer: all of these differ from it in padding only.
    Raises UserError if they cannot be found.
    """
    folder = configs_of(path, given) / part
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return folder, {}
    try:
        vocabulary, _ = (hub.file_of(TOKENIZER, file, None) for file in ("vocab.json", "merges.txt"))
    except UserError as error:
        raise UserError(
            f"{path} has no tokenizer, and CLIP's could not be had ({error}); set single_file_config to a diffusers "
            "pipeline of this architecture, whose configs and tokenizers are taken (no weights)"
        ) from None
    padding = ARCHITECTURES / architecture(path) / part / "tokenizer_config.json"
    return vocabulary.parent, {**json.loads(padding.read_text(encoding="utf-8")), "model_max_length": 77}


def check_parts(path: Path, given: str | None, texts: list[str], vae: bool) -> None:
    """Raises UserError if the tokenizers of these text encoders, or a VAE that is needed, cannot be found."""
    for text in texts:
        tokenizer_of(path, given, text.replace("text_encoder", "tokenizer"))
    if vae and not any(name.startswith(PREFIXES[architecture(path)]["vae"]) for name in read_header(path)):
        raise UserError(f"{path}: the file has no VAE; set pretrained_vae_model_name_or_path")


def load_tokenizer(path: Path, given: str | None, part: str) -> CLIPTokenizer:
    folder, settings = tokenizer_of(path, given, part)
    return CLIPTokenizer.from_pretrained(str(folder), **settings)


def load_part(path: Path, given: str | None, kind: Any, part: str, dtype: torch.dtype) -> Any:
    """The U-Net or the VAE, of class `kind`. Raises UserError if the file lacks some of its tensors."""
    configs = str(configs_of(path, given))
    with _quiet(), _whole(path, part):
        return kind.from_single_file(str(path), config=configs, subfolder=part, dtype=dtype, local_files_only=True)


def load_pipeline(path: Path, given: str | None, kind: Any, dtype: torch.dtype, **parts: Any) -> Any:
    """A pipeline of class `kind`, with these parts in place of the file's. Raises UserError for missing tensors."""
    configs = configs_of(path, given)
    tokenizers = [part for part in ("tokenizer", "tokenizer_2") if part in read_json(path, given, "model_index.json")]
    parts |= {part: load_tokenizer(path, given, part) for part in tokenizers}
    parts["feature_extractor"] = None  # SD 1.5's configs name a class for it that transformers no longer has
    with _quiet(), _whole(path, "text encoder"):
        pipe = kind.from_single_file(str(path), config=str(configs), dtype=dtype, local_files_only=True, **parts)
        modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
        if missing := [name for module in modules for name, p in module.named_parameters() if p.is_meta]:
            raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
        return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides diffusers' warnings about an intended cast and about the other parts' tensors in the file."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


@contextmanager
def _whole(path: Path, part: str) -> Iterator[None]:
    """Turns diffusers' errors for tensors that are missing or have another shape into a UserError."""
    try:
        yield
    except (NotImplementedError, ValueError, KeyError, RuntimeError) as error:  # the first: a tensor on the meta device
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: the {part} of the file is not whole, or of another architecture than its configs ({reason})",
            everywhere=False,
        ) from None
