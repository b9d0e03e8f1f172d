"""A blinded page for human judges: one HTML file, and the key to it in another that the judges do not get."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from evaluation.protocol import Config, read_index, write_atomically
from evaluation.report import embed, put, small
from ncp.common.errors import UserError

TEMPLATE = Path(__file__).with_name("annotate.html")
# The paper's Q2, Q1, Q3: appeal comes first, because afterwards the judge has seen the prompt.
QUESTIONS = {
    "appeal": "Which image is more visually appealing?",
    "overall": "Which image do you prefer, given the prompt?",
    "alignment": "Which image better fits the text of the prompt?",
}
ANSWERS = ("left", "right", "tie", "abstain")
SIDE = 1024  # pixels of an image on the page, at most


def write_page(config: Config) -> None:
    """Writes `annotation/page.html` and `annotation/key.json` into the output folder.

    Raises UserError if there are no two models, or if another page's key would be overwritten.
    """
    pairs = blind(config, read_index(config))
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
                **{side: small(Path(config.output_dir) / pair[f"{side}_file"], SIDE, 92) for side in ("left", "right")},
            }
            for pair in pairs
        ],
    }
    key = {"page": page, "pairs": [{k: pair[k] for k in ("prompt", "left", "right")} for pair in pairs]}
    write_atomically(folder / "key.json", lambda file: file.write_text(json.dumps(key, indent=1), encoding="utf-8"))
    text = put(TEMPLATE, {"DATA": embed(content)})
    write_atomically(folder / "page.html", lambda file: file.write_text(text, encoding="utf-8"))
    print(f"{len(pairs)} pairs, {len(QUESTIONS)} questions each")
    print(f"send to each judge: {folder / 'page.html'} ({len(text.encode()) / 2**20:.1f} MiB, opens offline)")
    print(f"keep to yourself:   {folder / 'key.json'}")
    print("then: evaluate.py compare --config ... --votes votes-*.json")


def blind(config: Config, index: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The pairs in the page's order: prompt, models left and right, and their files. Of each prompt the first sample.

    Which prompts, their order and sides are decided by hashes of seed and pair, not by what else is on the page.
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


def read_key(path: Path) -> dict[str, Any]:
    """Page id, and prompt, left and right model of each pair. Raises UserError if it is missing or damaged."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        if all({"prompt", "left", "right"} <= pair.keys() for pair in key["pairs"]) and key["page"]:
            return key
        reason = "a key is missing"
    except FileNotFoundError:
        raise UserError(f"{path} is missing; evaluate.py compare --annotate writes it beside the page") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    raise UserError(f"{path}: not the key of a page ({reason})")
