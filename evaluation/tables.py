"""The files that one step writes and the next one reads.

OUTPUT_DIR/protocol.json    what decides an image, and the models with the hashes of their weights
OUTPUT_DIR/images/MODEL/    one PNG per prompt and sample
OUTPUT_DIR/index.parquet    one row per image
OUTPUT_DIR/scores.parquet   one row per image and scorer
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.protocol import OLDER, EvaluationConfig, named_paths
from ncp.common.errors import UserError
from ncp.common.files import write_file, write_text

INDEX = pa.schema(
    [
        pa.field("model", pa.string()),
        pa.field("weights", pa.string()),
        pa.field("prompt_number", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("category", pa.string()),
        pa.field("categories", pa.list_(pa.string())),
        pa.field("sample", pa.int64()),
        pa.field("seed", pa.int64()),
        pa.field("file", pa.string()),
    ]
)
SCORES = pa.schema([*INDEX, pa.field("scorer", pa.string()), pa.field("score", pa.float64())])


# ---------------------------------------------------------------- protocol.json


def write_protocol(config: EvaluationConfig, base: dict[str, str], models: dict[str, dict[str, Any]]) -> None:
    """Writes the protocol, the parts of the base by name, and the models by name."""
    content = {"protocol": config.protocol(), "base": base, "models": models}
    write_text(Path(config.output_dir) / "protocol.json", json.dumps(content, indent=1))


def read_protocol(config: EvaluationConfig) -> dict[str, Any]:
    """The content that `generate` wrote. Raises UserError if it is missing or belongs to another protocol."""
    path = Path(config.output_dir) / "protocol.json"
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        was = noted["protocol"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run evaluate.py generate first, with this config") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
    was = OLDER | was
    if changed := [f"{k} {was.get(k)!r}, now {v!r}" for k, v in config.protocol().items() if was.get(k) != v]:
        raise UserError(
            f"output_dir: the images in {config.output_dir} were drawn with another protocol ({'; '.join(changed)}); "
            "restore it, or choose another output_dir"
        )
    return noted


# ---------------------------------------------------------------- index.parquet


def write_index(config: EvaluationConfig, rows: list[dict[str, Any]]) -> Path:
    """Writes one row per image, with the columns of INDEX. Returns the path."""
    path = Path(config.output_dir) / "index.parquet"
    _write_table(rows, INDEX, path)
    return path


def read_index(config: EvaluationConfig) -> list[dict[str, Any]]:
    """One row per image, as written by `generate`.

    Raises UserError if they belong to another protocol or other models than the config's, or if images are missing.
    """
    folder, noted = Path(config.output_dir), read_protocol(config)["models"]
    rows = _read_table(folder / "index.parquet", "generate").to_pylist()
    if absent := sorted(set(config.model_names) - {r["model"] for r in rows}):
        raise UserError(f"models: no images of {', '.join(absent)} in {folder}; run evaluate.py generate")
    for name, path in named_paths(config.models):
        if path and (was := noted.get(name, {}).get("path")) != path:
            raise UserError(f"models: the images of '{name}' are by {was}, not by {path}; run evaluate.py generate")
    if missing := [r["file"] for r in rows if not (folder / r["file"]).is_file()]:
        raise UserError(
            f"{folder}: {len(missing)} of {len(rows)} images are missing, such as {missing[0]}; "
            "run evaluate.py generate again, which draws what is missing"
        )
    return rows


def image_key(row: dict[str, Any]) -> tuple[str, str]:
    """The identity of a row's image: its file, and the weights that drew it."""
    return row["file"], row["weights"]


# ---------------------------------------------------------------- scores.parquet


def scores_path(config: EvaluationConfig) -> Path:
    return Path(config.output_dir) / "scores.parquet"


def write_scores(config: EvaluationConfig, rows: list[dict[str, Any]]) -> None:
    """Writes one row per image and scorer, with the columns of SCORES, in order of scorer and file.

    The table's metadata contain the protocol and the sources of all judges, including those of earlier runs.
    """
    path = scores_path(config)
    sources = _noted(_read_table(path, "score"))["scorers"] if path.exists() else {}
    scored = {r["scorer"] for r in rows}
    sources |= {name: config.source_of(name) for name in config.scorers if name in scored}
    noted = json.dumps({"protocol": config.protocol(), "scorers": sources})
    _write_table(sorted(rows, key=lambda r: (r["scorer"], r["file"])), SCORES.with_metadata({"noted": noted}), path)


def read_scores(config: EvaluationConfig) -> list[dict[str, Any]]:
    """The rows of the score table.

    Raises UserError if it belongs to another protocol than the config's, or if a scorer's checkpoint has changed.
    """
    path = scores_path(config)
    table = _read_table(path, "score")
    noted = _noted(table)
    was = OLDER | noted["protocol"]
    if changed := [key for key, value in config.protocol().items() if was.get(key) != value]:
        raise UserError(f"{path}: the scores are of another protocol ({', '.join(changed)}); remove it and score again")
    for name in config.scorers:
        if (was := noted["scorers"].get(name)) not in (None, now := config.source_of(name)):
            raise UserError(
                f"{path}: scores of '{name}' are by {was}, the config says {now}; remove it and score again"
            )
    return table.to_pylist()


def _noted(table: pa.Table) -> dict[str, Any]:
    try:
        return json.loads((table.schema.metadata or {})[b"noted"])
    except (KeyError, ValueError):
        raise UserError("scores.parquet was not written by evaluate.py score; remove it and score again") from None


# ---------------------------------------------------------------- parquet and CSV


def _write_table(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    write_file(path, lambda file: pq.write_table(pa.Table.from_pylist(rows, schema=schema), file))


def _read_table(path: Path, step: str) -> pa.Table:
    """A parquet table that an earlier step wrote. Raises UserError naming that step if it is missing or damaged."""
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run evaluate.py {step} first, with this config") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def write_csv(items: Sequence[Any], kind: type, path: Path) -> None:
    """Writes instances of the dataclass `kind`, one line each, with the field names as header."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, [f.name for f in fields(kind)])
    writer.writeheader()
    writer.writerows(asdict(item) for item in items)
    write_text(path, buffer.getvalue(), newline="")
