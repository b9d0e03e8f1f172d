"""Small preference datasets, made up, in the columns of the published ones; and what is made of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pipelines import jpeg

import prepare_preferences

datasets.disable_progress_bars()
PROMPTS = [f"a {colour} cat" for colour in ("red", "green", "blue", "black", "white", "grey")]


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """Bytes of a small image in one of the three formats."""
    if kind == "JPEG":
        return jpeg(seed)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(seed))).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def save_pictures(folder: Path, names: Sequence[str], kind: str = "JPEG") -> dict[str, bytes]:
    """Image files of these names, all different."""
    found = {}
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        found[name] = picture(seed, kind)
        (folder / name).write_bytes(found[name])
    return found


def hpdv2(folder: Path) -> list[str]:
    """train.json as one array, and train/NAME.jpg. Prompt k: image k0 beats k1 twice, k2 is beaten by k0."""
    save_pictures(folder / "train", [f"{k}{i}.jpg" for k in range(6) for i in range(3)])
    rows = []
    for k, prompt in enumerate(PROMPTS):
        for first, second, votes in ((0, 1, [1, 0]), (1, 0, [0, 1]), (2, 0, [0, 1])):
            row = {"prompt": prompt, "file_path": [f"{k}{first}.jpg", f"{k}{second}.jpg"], "user_hash": "ab" * 32}
            rows.append(row | {"human_preference": votes})
    (folder / "train.json").write_text(json.dumps(rows))
    return ["--format", "hpdv2", "--dataset_name", str(folder / "train.json"), "--images", str(folder / "train")]


def hpdv3(folder: Path) -> list[str]:
    """train.json; votes for the first three, none for the others."""
    save_pictures(folder, [f"images/uuids/{k}{i}.jpg" for k in range(6) for i in range(2)])
    votes = [[12, 7], [3, 16], [10, 10], None, None, None]
    rows = [
        {"prompt": prompt, "choice_dist": votes[k], "confidence": 0.99 if votes[k] else None, "model1": "flux",
         "path1": f"images/uuids/{k}0.jpg", "path2": f"images/uuids/{k}1.jpg", "model2": "infinity"}
        for k, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    (folder / "train.json").write_text(json.dumps(rows, indent=2))
    return ["--format", "hpdv3", "--dataset_name", str(folder / "train.json")]


def chosen_rejected(folder: Path) -> list[str]:
    """Parquet as `datasets` writes it, with its Image feature."""
    save_chosen_rejected(folder / "data" / "train-00000-of-00001.parquet")
    return ["--format", "chosen_rejected", "--dataset_name", str(folder)]


def save_chosen_rejected(file: Path, **columns: object) -> None:
    """prompt, chosen, rejected; chosen image k is picture(2k), rejected 2k + 1. Keyword arguments replace columns."""
    content = {
        "prompt": PROMPTS,
        "chosen": [{"bytes": picture(2 * k), "path": f"{k}.jpg"} for k in range(6)],
        "rejected": [{"bytes": picture(2 * k + 1), "path": None} for k in range(6)],
        **columns,
    }
    image, text = datasets.Image(), datasets.Value("string")
    features = datasets.Features({"prompt": text, "chosen": image, "rejected": image})
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(content, features=features).to_parquet(file)


def rapidata(folder: Path) -> list[str]:
    """Shares for three questions, which disagree; the last row says nothing about coherence."""
    shares = {
        "preference": [0.8, 0.3, 0.5, 0.55, 1.0, 0.9],
        "alignment": [0.1, 0.9, 0.4, 0.9, 0.2, 0.9],
        "coherence": [0.7, 0.7, 0.7, 0.7, 0.7, None],
    }
    content: dict[str, list] = {"prompt": PROMPTS, "model1": ["a"] * 6, "model2": ["b"] * 6}
    for i in (1, 2):
        content[f"image{i}"] = [{"bytes": picture(10 * k + i), "path": None} for k in range(6)]
        for question, values in shares.items():
            share = [None if v is None else v if i == 1 else 1 - v for v in values]
            content[f"weighted_results_image{i}_{question}"] = share
            content[f"detailed_results_{question}"] = ["[]"] * 6
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.table(content), folder / "data" / "train-00000-of-00001.parquet")
    return ["--format", "rapidata", "--dataset_name", str(folder)]


def imagereward(folder: Path) -> list[str]:
    """metadata-train.parquet and WEBP files. Three images a prompt, of which the second and third share a rank."""
    rows = []
    names = [f"images/train/train_1/{k}{i}.webp" for k in range(6) for i in range(3)]
    save_pictures(folder, names, "WEBP")
    for n, name in enumerate(names):
        k, i = divmod(n, 3)
        rows.append(
            {"image_path": name, "prompt_id": f"{k:06d}-0001", "prompt": PROMPTS[k], "classification": "Animals",
             "image_amount_in_total": 3, "rank": (1, 2, 2)[i], "overall_rating": (3, 3, 6)[i],
             "image_text_alignment_rating": (1, 2, 3)[i], "fidelity_rating": 7}
        )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata-train.parquet")
    return ["--format", "imagereward", "--dataset_name", str(folder / "metadata-train.parquet")]


def table(folder: Path) -> list[str]:
    """A folder of PNG files, and a CSV file that lists the pairs, with words for what is better."""
    save_pictures(folder, [f"{side}/{k}.png" for k in range(6) for side in ("left", "right")], "PNG")
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "a", "b", "better", "when"])
        for k, prompt in enumerate(PROMPTS):
            choice = ("A", "B", "same")[k % 3]
            writer.writerow([prompt, f"left/{k}.png", f"right/{k}.png", choice, f"2024-05-0{k + 1}T12:00:00"])
    return [
        "--format", "table", "--dataset_name", str(folder / "pairs.csv"), "--prompt_column", "text",
        "--image_columns", "[a, b]", "--preference_columns", "better", "--preference_words", "[A, B, same]",
        "--created_at_column", "when",
    ]  # fmt: skip


SETS = {
    f.__name__: f for f in (hpdv2, hpdv3, chosen_rejected, rapidata, imagereward, table)
}  # each makes its files in a folder, and returns the arguments that read them


def prepared(arguments: Sequence[object], output: Path, *extra: object) -> tuple[list[dict], dict]:
    """(the rows that prepare_preferences.py writes, its manifest)."""
    prepare_preferences.main([*map(str, arguments), "--output_dir", str(output), *map(str, extra)])
    rows = [row for file in sorted(output.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return rows, json.loads((output / "manifest.json").read_text())
