"""A blinded page for human judges: one HTML file, and its key in another file that the judges do not get."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from evaluation.pages import fill_template, script_json, thumbnail_url
from evaluation.protocol import EvaluationConfig
from evaluation.tables import read_index
from evaluation.votes import QUESTIONS, read_key
from ncp.common.errors import UserError
from ncp.common.files import write_text

TEMPLATE = Path(__file__).with_name("annotate.html")
SIDE = 1024  # maximum side of an image on the page, in pixels


def annotate(config: EvaluationConfig) -> None:
    """Writes `annotation/page.html` and `annotation/key.json` into the output folder.

    Raises UserError if there are no two models, or if another page's key would be overwritten.
    """
    pairs = blinded_pairs(config, read_index(config))
    page = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:12]
    folder = Path(config.output_dir) / "annotation"
    if (folder / "key.json").exists() and read_key(folder / "key.json")["page"] != page:
        raise UserError(
            f"{folder} holds another page, whose votes need its key.json; rename the folder to make a new one"
        )
    content = {
        "page": page,
        "questions": [{"name": name, "text": text} for name, text in QUESTIONS.items()],
        "pairs": [
            {
                "prompt": pair["prompt"],
                **{
                    side: thumbnail_url(Path(config.output_dir) / pair[f"{side}_file"], SIDE, quality=92)
                    for side in ("left", "right")
                },
            }
            for pair in pairs
        ],
    }
    key = {"page": page, "pairs": [{k: pair[k] for k in ("prompt", "left", "right")} for pair in pairs]}
    text = fill_template(TEMPLATE, {"DATA": script_json(content)})
    folder.mkdir(exist_ok=True)
    write_text(folder / "key.json", json.dumps(key, indent=1))
    write_text(folder / "page.html", text)
    print(f"{len(pairs)} pairs, {len(QUESTIONS)} questions each")
    print(f"send to each judge: {folder / 'page.html'} ({len(text.encode()) / 2**20:.1f} MiB, opens offline)")
    print(f"keep to yourself:   {folder / 'key.json'}")
    print("then: evaluate.py count --config ... --votes votes-*.json")


def blinded_pairs(config: EvaluationConfig, index: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The pairs in the page's order: prompt, models left and right, and their files. Uses each prompt's first sample.

    Hashes of seed and pair decide the prompts, their order and their sides, independently of the rest of the page.
    """
    names = config.model_names
    if len(names) < 2:
        raise UserError("annotate: there is only one model; expected two or more in models")
    files = {(r["model"], r["prompt"]): r["file"] for r in index if r["sample"] == 0}

    def draw(*item: str) -> bytes:
        return hashlib.sha256("\n".join([str(config.seed), "annotate", *item]).encode()).digest()

    prompts = sorted({prompt for _, prompt in files}, key=draw)[: config.annotate_prompts]
    pairs = []
    for prompt, models in itertools.product(prompts, itertools.combinations(names, 2)):
        left, right = models if draw("side", prompt, *models)[0] % 2 else models[::-1]
        sides = {"left": left, "right": right, "left_file": files[left, prompt], "right_file": files[right, prompt]}
        pairs.append({"prompt": prompt, **sides})
    return sorted(pairs, key=lambda p: draw("order", p["prompt"], *sorted((p["left"], p["right"]))))
