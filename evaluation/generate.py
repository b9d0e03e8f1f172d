"""Step 1: draws one image per model, prompt and sample, each independent of the others."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from evaluation.models import (
    Model,
    changed_parts,
    common_parts,
    find_base,
    find_models,
    has_a_sampler_of_its_own,
    open_pipeline,
    sampler,
)
from evaluation.processes import processes
from evaluation.prompts import read_prompts
from evaluation.protocol import EvaluationConfig
from evaluation.tables import read_protocol, write_index, write_protocol
from ncp.common.errors import UserError
from ncp.common.files import write_file


def seed_of(seed: int, prompt: str, sample: int) -> int:
    """The noise seed of one image, in [0, 2^63): the same for every model, and independent of the other prompts."""
    digest = hashlib.sha256(f"{seed}\n{sample}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def image_rows(config: EvaluationConfig, models: list[Model], prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of the index per image, ordered by model, prompt and sample."""
    rows = []
    for model in models:
        for number, row in enumerate(prompts):
            name = hashlib.sha256(row["prompt"].encode()).hexdigest()[:16]
            for sample in range(config.samples_per_prompt):
                rows.append(
                    {
                        "model": model.name,
                        "weights": model.weights,
                        "prompt_number": number,
                        **row,
                        "sample": sample,
                        "seed": seed_of(config.seed, row["prompt"], sample),
                        "file": f"images/{model.name}/{name}-{sample}.png",
                    }
                )
    return rows


def generate(config: EvaluationConfig) -> None:
    """Draws the missing images, then writes the index. Several processes share the batches."""
    prompts, repeated = read_prompts(config)
    base = find_base(config)
    models = find_models(config, base)
    for model in [base, *models]:
        sampler(model, config)  # for its errors, before anything is written
    folder = Path(config.output_dir)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision is fp16, which needs a GPU; without one use bf16 or no")
    state = processes()
    models = note_models(config, base, models, main=state.is_main_process)
    rows = image_rows(config, models, prompts)
    todo = [r for r in rows if not (folder / r["file"]).is_file()]
    state.wait_for_everyone()  # no process may draw before all have checked the folder
    if state.is_main_process:
        if todo:  # if this run is interrupted, an old index would be wrong
            (folder / "index.parquet").unlink(missing_ok=True)
        dropped = f" (drawn once: {repeated} repeated)" if repeated else ""
        print(f"{len(models)} models x {len(prompts)} prompts{dropped} x {config.samples_per_prompt} samples", end=": ")
        print(f"{len(rows)} images, {len(rows) - len(todo)} of them drawn before")
        several = f"{state.num_processes} processes" if state.num_processes > 1 else "one process"
        print(f"protocol: {config.described()}; {several} on {state.device}")
    for model in models:
        own = [r for r in todo if r["model"] == model.name]
        batches = [own[i : i + config.batch_size] for i in range(0, len(own), config.batch_size)]
        if batches := batches[state.process_index :: state.num_processes]:
            draw_all(model, config, batches, state)
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"wrote {write_index(config, rows)}; next: evaluate.py score")


def note_models(config: EvaluationConfig, base: Model, models: list[Model], main: bool) -> list[Model]:
    """Records protocol, base and models in the output folder. Returns the models with the weight hashes recorded there.

    Raises UserError if it holds images of another protocol, of another base, or of a model that has changed since.
    """
    path = Path(config.output_dir) / "protocol.json"
    noted = read_protocol(config) if path.exists() else {"models": {}}
    known, common = noted["models"], common_parts(base, config)
    drawn = [m for m in known if (path.parent / "images" / m).exists()]
    if "base" in noted and drawn and (changed := changed_parts(common, noted["base"])):
        raise UserError(
            f"{config.pretrained_model_name_or_path} has changed since the images in {path.parent} were drawn "
            f"({changed}); restore it, or choose another output_dir"
        )
    noted_models = []
    for model in models:
        images, was = path.parent / "images" / model.name, known.get(model.name)
        if model.name in drawn and was:
            if changed := changed_since(model, was):
                raise UserError(
                    f"model '{model.name}': the images in {images} were drawn with other weights ({was['path']}; "
                    f"changed: {changed}); remove that folder, or use another name"
                )
            if "base" not in noted and config.scheduler == "pipeline" and has_a_sampler_of_its_own(model, config):
                raise UserError(
                    f"model '{model.name}': the images in {images} were drawn with its own sampler, by an older "
                    "version; now all models have the base's; remove that folder"
                )
            model = replace(model, weights=was["weights"])  # index and scores identify images by this
        noted_models.append(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: cannot create {path.parent} ({error.strerror})") from None
    if main:
        write_protocol(config, common, {**known, **{m.name: asdict(m) for m in noted_models}})
    return noted_models


def changed_since(model: Model, was: dict[str, Any]) -> str:
    """Which parts of a model differ from those recorded in `was`, in words; empty if none does."""
    if was.get("parts"):
        return changed_parts(model.parts, was["parts"])
    # An older version recorded one hash; for a pipeline, that of its U-Net only.
    return "" if was["weights"] in (model.weights, model.parts.get("unet")) else "weights"


def draw_all(model: Model, config: EvaluationConfig, batches: list[list[dict[str, Any]]], state: Any) -> None:
    """Draws and saves this process's batches of one model."""
    pipe = open_pipeline(model, config, state.device)
    bar = tqdm(total=sum(map(len, batches)), desc=model.name, unit="image", disable=not state.is_main_process)
    for batch in batches:
        for row, image in zip(batch, draw(pipe, batch, config), strict=True):
            save(image, row, config)
        bar.update(len(batch))
    bar.close()


def draw(pipe: Any, rows: list[dict[str, Any]], config: EvaluationConfig) -> list[Any]:
    """One PIL image per row, each from its own random generator."""
    # Here: diffusers takes seconds, and input errors come earlier.
    from ncp.training.drawing import decode_latents
    from ncp.training.pipeline import FAMILIES

    with torch.no_grad():
        latents = pipe(
            [r["prompt"] for r in rows],
            height=config.resolution,
            width=config.resolution,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator().manual_seed(r["seed"]) for r in rows],
            output_type="latent",
            **FAMILIES[type(pipe)].draw_arguments(config.max_sequence_length),
        ).images
    return decode_latents(pipe.vae, latents)  # not by the pipeline: the VAE may have another precision


def save(image: Any, row: dict[str, Any], config: EvaluationConfig) -> None:
    """Writes a PNG with prompt, model, sample, seed and protocol as text entries."""
    import diffusers  # here: it takes seconds, and input errors come earlier

    text = PngInfo()
    for key in ("prompt", "model", "sample", "seed"):
        text.add_itxt(key, str(row[key]))
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    text.add_itxt("protocol", json.dumps({**config.protocol(), **versions}))
    path = Path(config.output_dir) / row["file"]
    path.parent.mkdir(parents=True, exist_ok=True)  # not earlier: the folder means that a model has images
    write_file(path, lambda file: image.save(file, "PNG", pnginfo=text))
