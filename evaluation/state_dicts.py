"""Single files of weights: detects their content, and loads a state dict into a U-Net. Runs no code from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ncp.common.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
PREFIXES = ("module.", "unet.")  # of a U-Net in DDP, or in a larger module that was saved


def kind_of_file(what: str, file: Path) -> str:
    """The content of a file, by its tensors' names: "lora", "unet state", or "checkpoint" for a complete model.

    Reads no weights. what: the subject of the error message. Raises UserError for other content or a damaged file.
    """
    if file.suffix not in SUFFIXES:
        raise UserError(f"{what}: {file} is no file of weights; expected one of {', '.join(SUFFIXES)}")
    try:
        names = _names(file)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    if any("lora" in name.lower() for name in names):
        if file.suffix != ".safetensors":
            raise UserError(f"{what}: {file} is a LoRA in a pickle; expected one as .safetensors")
        return "lora"
    if "conv_in.weight" in {_bare(name) for name in names}:
        return "unet state"
    if any(name.startswith("model.diffusion_model.") for name in names):
        if file.suffix != ".safetensors":
            raise UserError(f"{what}: {file} is a whole checkpoint in a pickle; expected one as .safetensors")
        return "checkpoint"
    shown = next(iter(names), "no tensors")
    raise UserError(f"{what}: {file} holds the weights neither of a LoRA nor of a diffusers U-Net, but {shown}")


def only_file_on_hub(repository: str, revision: str | None) -> str | None:
    """The only weight file at the top of a repository; None if there is not exactly one, or no list of files."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(repository, revision=revision)
    except Exception:  # for example offline: the caller's error message is enough
        return None
    weights = [n for n in names if "/" not in n and Path(n).suffix in SUFFIXES]
    return weights[0] if len(weights) == 1 else None


def only_file(folder: Path) -> Path | None:
    """The only weight file in a folder without a config, such as a LoRA under another file name; else None."""
    files = [f for f in sorted(folder.glob("*")) if f.is_file() and f.suffix in SUFFIXES]
    return files[0] if len(files) == 1 and not (folder / "config.json").exists() else None


def load_unet_state(unet: Any, file: Path) -> None:
    """Loads a file's weights into a diffusers U-Net. Raises ValueError if they do not fit that U-Net."""
    state = {_bare(name): value for name, value in _state(file).items()}
    own = unet.state_dict()
    missing, strange = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    if missing or strange or other:
        wrong = {"missing": missing, "unknown": strange, "of another shape": sorted(other)}
        named = [f"{len(names)} {word} (such as {names[0]})" for word, names in wrong.items() if names]
        raise ValueError(f"the file's weights are not those of the base's U-Net: {', '.join(named)}")
    unet.load_state_dict(state)  # converts to the U-Net's precision


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _names(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                return list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not readable as safetensors ({_line(error)})") from None
    return list(_state(file))


def _state(file: Path) -> dict[str, Any]:
    """Tensors by name. A torch file of PyTorch 1.6 or later is memory-mapped: tensors are read when they are used."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    import torch

    with open(file, "rb") as handle:
        mapped = handle.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # many kinds, for a damaged or wrong pickle
        raise UserError(f"{file} is not readable as a torch file of weights alone ({_line(error)})") from None
    if isinstance(content, dict):
        for key in ("state_dict", "model"):  # some files wrap the state dict
            if isinstance(content.get(key), dict):
                content = content[key]
        tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
        if tensors and len(tensors) == len(content):
            return tensors
    raise UserError(f"{file} holds no state dict, tensors by name, but a {type(content).__name__}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
