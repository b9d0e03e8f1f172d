"""The models that are compared: the base pipeline, LoRAs, U-Nets, other pipelines and training checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaluation.protocol import EvaluationConfig, named_paths
from evaluation.state_dicts import SUFFIXES, kind_of_file, load_unet_state, only_file, only_file_on_hub
from ncp.common import hub
from ncp.common.errors import UserError
from ncp.common.files import sha256

LORA = "pytorch_lora_weights.safetensors"
# The file that identifies the kind of a folder or hub repository, checked in this order.
FILE_OF_KIND = {"pipeline": "model_index.json", "lora": LORA, "unet": "unet/config.json", "bare unet": "config.json"}
# A model may also be a single file of weights under any name: on the hub OWNER/NAME/FILE.
HUB_FILE = r"(\w[\w.-]*/[\w.-]+)/([\w./+ -]+)"
WEIGHTS = (".safetensors", ".bin")
SCHEDULER = "scheduler/scheduler_config.json"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that are not used for drawing here
PIPELINE_CLASSES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
UNET_CLASS = "UNet2DConditionModel"


@dataclass(frozen=True)
class Model:
    """A model to draw with. `weights` identifies its images: a hash of `parts`, or the hub's commit.

    kind: a key of FILE_OF_KIND, or "lora" or "unet state" for the single file `file`.
    parts: hashes of everything that it draws with, by name: a pipeline's components, else "weights" or "commit".
    run, step, seconds (training time so far, if known): only for training checkpoints.
    """

    name: str
    kind: str
    path: str
    weights: str
    run: str | None = None
    step: int | None = None
    seconds: float | None = None
    parts: dict[str, str] = field(default_factory=dict)
    file: str | None = None


def find_base(config: EvaluationConfig) -> Model:
    """The base pipeline, to which LoRAs and U-Nets are applied. Raises UserError if it is not a pipeline."""
    base = find_model("base", config.pretrained_model_name_or_path, config)
    if base.kind != "pipeline":
        raise UserError(f"pretrained_model_name_or_path: {base.path} is a {base.kind}; expected a diffusers pipeline")
    return base


def find_models(config: EvaluationConfig, base: Model) -> list[Model]:
    """The configured models, then the runs' checkpoints in order of step. Loads nothing.

    Raises UserError for a model that does not exist, or that is of no kind in FILE_OF_KIND.
    """
    found = []
    for name, path in named_paths(config.models):
        found.append(find_model(name, path, config) if path else base)
    for name, path in named_paths(config.runs):
        found += find_checkpoints(name, Path(path))
    return found


def find_model(name: str, path: str, config: EvaluationConfig) -> Model:
    """The model of a NAME=PATH entry. Raises UserError if there is none."""
    place = Path(path)
    if place.is_file():
        if (kind := kind_of_file(f"model '{name}'", place)) == "checkpoint":
            return _in_one_file(name, path, config)
        return Model(name, kind, path, digest := sha256(place), parts={"weights": digest}, file=path)
    if not place.is_dir():
        if (match := re.fullmatch(HUB_FILE, path)) and place.suffix in SUFFIXES:
            return _file_on_hub(name, path, *match.groups())
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
            raise UserError(f"model '{name}': no such file or folder: {path}")
        return _on_hub(name, path, config.revision if path == config.pretrained_model_name_or_path else None)
    found = next((k for k, file in FILE_OF_KIND.items() if (place / file).is_file()), None)
    if found is None and (only := only_file(place)):
        return replace(find_model(name, str(only), config), path=path)
    if found is None:
        hint = "; name the run's checkpoints in runs" if list(place.glob("checkpoint-*")) else ""
        raise UserError(f"model '{name}': {path} holds neither a pipeline, nor {LORA}, nor a U-Net{hint}")
    _check_class(name, found, place / FILE_OF_KIND[found])
    parts = _hash_parts(place, found, config.variant)
    whole = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Model(name, found, path, parts.get("weights", whole), parts=parts)


def common_parts(base: Model, config: EvaluationConfig) -> dict[str, str]:
    """The parts that all images of a protocol share, by name: those of the base, and of a VAE that replaces its own."""
    if (vae := config.pretrained_vae_model_name_or_path) is None:
        return base.parts
    from ncp.training.pipeline import identity

    return {**{k: v for k, v in base.parts.items() if k != "vae"}, "replacement VAE": identity(vae, None, "")}


def _in_one_file(name: str, path: str, config: EvaluationConfig) -> Model:
    """A complete single-file checkpoint, identified by the file, the tokenizers and the configs.

    Raises UserError if it cannot be used.
    """
    from ncp.training import single_file  # here and below: it takes seconds, and not every step needs it

    place, given = Path(path), config.single_file_config
    parts = {"checkpoint": sha256(place)}
    for part in ("tokenizer", "tokenizer_2")[: 1 + (single_file.architecture(place) == "sdxl")]:
        parts[part] = single_file.identity(place, given, part)
    configs = single_file.configs_of(place, given)
    used = sorted(f for part in single_file.PREFIXES["sdxl"] for f in configs.glob(f"{part}/*.json"))
    parts["configs"] = hashlib.sha256("".join(f.parent.name + sha256(f) for f in used).encode()).hexdigest()
    whole = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Model(name, "pipeline", path, whole, parts=parts)


def changed_parts(now: dict[str, str], before: dict[str, str]) -> str:
    """The names of the parts that differ; empty if none does."""
    return ", ".join(k for k in {**before, **now} if now.get(k) != before.get(k))


def find_checkpoints(run: str, folder: Path) -> list[Model]:
    """The checkpoints in a training run's output folder, in order of step."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / LORA).is_file() and (step := checkpoint.name.rpartition("-")[2]).isdigit():
            manifest = checkpoint / "manifest.json"
            seconds = _json(manifest).get("seconds") if manifest.is_file() else None
            digest = sha256(checkpoint / LORA)
            own = {"weights": digest}
            found.append(Model(f"{run}@{step}", "lora", str(checkpoint), digest, run, int(step), seconds, own))
    if not found:
        raise UserError(f"runs: '{run}': no checkpoint-STEP folder with {LORA} in {folder}")
    return sorted(found, key=lambda m: m.step or 0)


def open_pipeline(model: Model, config: EvaluationConfig, device: Any) -> Any:
    """The model as a diffusers pipeline on its device, in the protocol's precision and with its sampler.

    The VAE (its own or the replacement) is in float32 if its config requires that: SDXL's overflows in fp16.
    """
    import diffusers
    import torch
    import transformers

    from ncp.training import single_file
    from ncp.training.pipeline import FAMILIES, PIPELINES, parts_of, read_json

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    base = config.pretrained_model_name_or_path
    name = model.path if model.kind == "pipeline" else base
    where = {"revision": config.revision if name == base else None, "variant": config.variant}
    replacement, given = config.pretrained_vae_model_name_or_path, config.single_file_config
    in_one = single_file.is_single_file(name)
    vae_from: dict[str, str | None] = {"pretrained_model_name_or_path": replacement or name}
    vae_from |= {} if replacement else {**where, "subfolder": "vae"}
    try:
        # Passed to the constructor, which would otherwise warn about the pipeline's own scheduler.
        index = read_json(name, FILE_OF_KIND["pipeline"], where["revision"], given)
        kind = PIPELINES[index["_class_name"]]
        FAMILIES[kind].check_length(name, parts_of(index), config.max_sequence_length)
        parts = {"scheduler": sampler(model, config), **FAMILIES[kind].left_out(kind, parts_of(index))}
        if in_one and not replacement:
            vae_config = single_file.read_json(Path(name), given, "vae/config.json")
        else:
            vae_config = diffusers.AutoencoderKL.load_config(**vae_from)
        vae_dtype = torch.float32 if vae_config.get("force_upcast", True) else dtype  # AutoencoderKL's default
        if in_one and not replacement:
            parts["vae"] = single_file.load_part(Path(name), given, diffusers.AutoencoderKL, "vae", vae_dtype)
        else:
            parts["vae"] = diffusers.AutoencoderKL.from_pretrained(**vae_from, dtype=vae_dtype)
        if in_one:
            pipe = single_file.load_pipeline(Path(name), given, kind, dtype, **parts)
        else:
            pipe = diffusers.DiffusionPipeline.from_pretrained(name, dtype=dtype, **parts, **where)
        if (part := FAMILIES[kind].DENOISER) != "unet" and "unet" in model.kind:
            raise ValueError(f"it is a U-Net, and the base has a {part}")
        if model.kind == "unet state":
            load_unet_state(pipe.unet, Path(str(model.file)))
        elif "unet" in model.kind:
            folder = {"subfolder": "unet"} if model.kind == "unet" else {}
            unet = diffusers.UNet2DConditionModel.from_pretrained(model.path, dtype=dtype, **folder)
            pipe.register_modules(unet=unet)
        if model.kind == "lora":
            pipe.load_lora_weights(model.file or model.path)
            if not pipe.get_active_adapters():  # diffusers does not report it, and would draw the base
                raise ValueError("none of its weights belong to this model; of SD3 only diffusers' form is read")
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # a missing file, other shapes, damaged weights
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"model '{model.name}': loading {model.path} over {base} failed: {reason}") from None
    if config.resolution % (multiple := pipe.vae_scale_factor * getattr(pipe, "patch_size", 1)):
        raise UserError(f"resolution is {config.resolution}; {name} needs a multiple of {multiple}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def sampler(model: Model, config: EvaluationConfig) -> Any:
    """The protocol's sampler: one class and the same settings for all models; with `pipeline` those of the base.

    The settings that belong to the weights come from each pipeline: noise schedule and prediction type.
    Raises UserError if the base names a sampler that diffusers does not have.
    """
    import diffusers

    from ncp.training.pipeline import read_json, read_schedule
    from ncp.training.schedules import SCHEDULE, check_prediction, scheduler_like

    base = config.pretrained_model_name_or_path
    settings, _ = read_schedule(config)
    flow = "FlowMatch" in settings.get("_class_name", "")
    if flow and config.scheduler not in ("pipeline", "euler"):
        raise UserError(f"scheduler is {config.scheduler}; {base} is a flow-matching model: euler or pipeline")
    if flow or config.scheduler == "pipeline":
        changes: dict[str, Any] = {}
        cls: Any = getattr(diffusers, str(settings.get("_class_name")), None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
            raise UserError(f"{base}: {SCHEDULER} names no sampler of diffusers: {settings.get('_class_name')}")
    else:
        cls, changes = {
            "ddim": (diffusers.DDIMScheduler, {}),
            "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),  # as in Stable Diffusion's own config
            "euler": (diffusers.EulerDiscreteScheduler, {}),
            "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {}),
        }[config.scheduler]
    if model.kind == "pipeline" and model.path != base:
        own = read_json(model.path, SCHEDULER, None, config.single_file_config)
        if ("FlowMatch" in own.get("_class_name", "")) != flow:
            kinds = ("a flow-matching model", "one with DDPM's noise")
            raise UserError(f"model '{model.name}': {model.path} is {kinds[flow]}, and the base is {kinds[not flow]}")
        settings = sampler_settings(settings) | {k: v for k, v in own.items() if k in SCHEDULE}
    if flow:
        cls = cls if config.scheduler == "pipeline" else diffusers.FlowMatchEulerDiscreteScheduler
        return cls.from_config(settings)
    check_prediction(model.path, settings)
    return scheduler_like(cls, settings, **changes)


def sampler_settings(scheduler: dict[str, Any]) -> dict[str, Any]:
    """A scheduler config without the keys that belong to the weights."""
    from ncp.training.schedules import SCHEDULE

    return {k: v for k, v in scheduler.items() if k not in (*SCHEDULE, "_diffusers_version")}


def has_a_sampler_of_its_own(model: Model, config: EvaluationConfig) -> bool:
    """Whether this pipeline's scheduler config differs from the base's in the sampler or its settings."""
    from ncp.training.pipeline import read_json

    base = config.pretrained_model_name_or_path
    if model.kind != "pipeline" or model.path == base:
        return False
    own = read_json(model.path, SCHEDULER, None, config.single_file_config)
    bases = read_json(base, SCHEDULER, config.revision, config.single_file_config)
    return sampler_settings(own) != sampler_settings(bases)


def _hash_parts(folder: Path, kind: str, variant: str | None) -> dict[str, str]:
    """Hashes by part: of a pipeline's components and their configs, else of the weights.

    The hash of a pipeline's denoiser covers its weight files only, because older versions identified pipelines by it.
    """
    if kind != "pipeline":
        return {"weights": _hash_weights(folder / "unet" if kind == "unet" else folder, kind, variant)}
    denoiser = "transformer" if (folder / "transformer").is_dir() else "unet"
    parts = {denoiser: _hash_weights(folder / denoiser, kind, variant)}
    for name, value in _json(folder / FILE_OF_KIND["pipeline"]).items():
        if isinstance(value, list) and value[0] is not None and name not in UNUSED:
            weights = _weights(folder / name, variant)
            files = [f for f in sorted((folder / name).glob("*")) if f.is_file() and f.suffix not in WEIGHTS]
            files = files if name == denoiser else weights + files
            key = f"{denoiser} config" if name == denoiser else name
            parts[key] = hashlib.sha256("".join(f.name + sha256(f) for f in files).encode()).hexdigest()
    return parts


def _hash_weights(folder: Path, kind: str, variant: str | None) -> str:
    """One hash over the weight files of a LoRA or a U-Net. Raises UserError if there are none."""
    files = [f for f in [folder / LORA] if f.is_file()] if kind == "lora" else _weights(folder, variant)
    if not files:
        raise UserError(f"{folder}: no weight files")
    return hashlib.sha256("".join(sha256(f) for f in files).encode()).hexdigest()


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """Weight files in order of name. If a folder holds several variants of the weights, only the one in use counts."""
    files = sorted(f for f in folder.glob("*") if f.suffix in WEIGHTS)
    return [f for f in files if variant and f".{variant}." in f.name] or files


def _on_hub(name: str, repository: str, revision: str | None) -> Model:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for kind, file in FILE_OF_KIND.items():
        try:
            path = Path(hf_hub_download(repository, file, revision=revision))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                continue
            failure: Exception = error
        except Exception as error:  # gated, no such repository, a proxy
            failure = error
        else:
            _check_class(name, kind, path)
            commit = hub.commit_of(path)
            return Model(name, kind, repository, commit, parts={"commit": commit})
        reason = hub.reason(failure)
        raise UserError(f"model '{name}': {repository} is no local folder; the hub gave no {file}: {reason}") from None
    if only := only_file_on_hub(repository, revision):  # such as a LoRA under another file name
        return _file_on_hub(name, repository, repository, only)
    raise UserError(f"model '{name}': the hub's {repository} holds neither a pipeline, nor {LORA}, nor a U-Net")


def _file_on_hub(name: str, path: str, repository: str, file: str) -> Model:
    """A single file of weights in a hub repository. Raises UserError if it is unavailable or holds other weights."""
    from huggingface_hub import hf_hub_download

    try:
        place = Path(hf_hub_download(repository, file))
    except Exception as error:  # many kinds: offline, gated, no such repository
        raise UserError(
            f"model '{name}': no such file: {path}; nor did the hub's {repository} give {file}: {hub.reason(error)}"
        ) from None
    commit = hub.commit_of(place)
    if (kind := kind_of_file(f"model '{name}'", place)) == "checkpoint":
        raise UserError(f"model '{name}': {path} is a whole checkpoint in one file; download it and give its path here")
    return Model(name, kind, path, commit, parts={"commit": commit, "file": file}, file=str(place))


def _check_class(name: str, kind: str, file: Path) -> None:
    """Raises UserError if a pipeline's or U-Net's JSON names another class."""
    expected = {"pipeline": PIPELINE_CLASSES, "unet": (UNET_CLASS,), "bare unet": (UNET_CLASS,)}.get(kind)
    if expected and (found := _json(file).get("_class_name")) not in expected:
        raise UserError(f"model '{name}': {file} is of a {found}; expected {' or '.join(expected)}")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from None
    return content if isinstance(content, dict) else {}
