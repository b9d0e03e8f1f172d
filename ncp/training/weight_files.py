"""Checks that a pipeline has the weight files that a run loads, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from ncp.common import hub
from ncp.common.errors import UserError
from ncp.training import single_file
from ncp.training.settings import TrainingConfig


def check_weights(config: TrainingConfig, denoiser: str, texts: list[str]) -> None:
    """Raises UserError if a part that this run loads has no .safetensors files of the variant.

    denoiser, texts: names of these parts. The text encoders may lack the variant: diffusers then takes the files
    without it. For a hub model the hub's list of files is used; without an answer nothing is checked.
    """
    name = config.pretrained_model_name_or_path
    encodes, own_vae = config.cached_latents is None, config.pretrained_vae_model_name_or_path is None
    if single_file.is_single_file(name):
        if encodes:
            single_file.check_parts(Path(name), config.single_file_config, texts, own_vae)
        return
    folder = Path(name)
    listed = None if folder.is_dir() else hub.files_of(name, config.revision)
    for part in [denoiser, *(["vae"] if own_vae else []), *texts] if encodes else [denoiser]:
        if folder.is_dir():
            check_files(f"{folder / part}", [f.name for f in (folder / part).iterdir()], config.variant, part in texts)
        elif listed is not None:
            files = [f.removeprefix(f"{part}/") for f in listed if f.startswith(f"{part}/")]
            check_files(f"{name}: {part}", files, config.variant, part in texts)


def check_files(where: str, files: list[str], variant: str | None, plain_will_do: bool = False) -> None:
    """Raises UserError unless these files of a part hold .safetensors weights of the variant.

    Names are diffusers': diffusion_pytorch_model[.VARIANT][-00001-of-00002].safetensors.
    """
    weights = [f for f in files if f.endswith(".safetensors")]
    if not weights:
        pickles = [f for f in files if f.endswith((".bin", ".ckpt", ".pt"))]
        if not pickles:
            raise UserError(f"{where} has no weights")
        raise UserError(
            f"{where} has only {pickles[0]}, a pickle, which may run code when it is read; if you trust it, convert "
            "the pipeline once: DiffusionPipeline.from_pretrained(MODEL, use_safetensors=False).save_pretrained(FOLDER)"
        )
    variants = {f.split(".")[1].split("-")[0] if f.count(".") > 1 else None for f in weights}
    if variant not in variants and not (plain_will_do and None in variants):
        known = sorted("null" if v is None else v for v in variants - {"non_ema"})
        raise UserError(f"{where} has no weights of variant {variant or 'null'}; set variant: {' or '.join(known)}")
