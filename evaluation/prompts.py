"""Prompts and their categories, from files or a hub dataset."""

from __future__ import annotations

import csv
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from evaluation.protocol import EvaluationConfig
from ncp.common import hub
from ncp.common.errors import UserError

COLUMNS = ("prompt", "caption", "text")  # tried in this order, whatever their case
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".parquet")


def read_prompts(config: EvaluationConfig) -> tuple[list[dict[str, str]], int]:
    """([{prompt, category}], number of repeated prompts left out), in the order of the files.

    Raises UserError for a file that is missing, unreadable or without prompts, and for a missing column.
    """
    if config.prompts == "tiny":
        from tiny import world

        held_out = world.split_scenes()[1]
        found = [{"prompt": s.prompt(t), "category": s.shape} for t in range(len(world.TEMPLATES)) for s in held_out]
    else:
        files = _files(config)
        found = [row for file in files for row in _read(file, config, file.stem if len(files) > 1 else "")]
    unique: dict[str, dict[str, str]] = {}
    for row in found:
        unique.setdefault(row["prompt"], row)
    if not unique:
        raise UserError(f"prompts: not a single prompt in {config.prompts}")
    return list(unique.values())[: config.max_prompts], len(found) - len(unique)


def _files(config: EvaluationConfig) -> list[Path]:
    path = Path(config.prompts)
    if path.is_file():
        return [path]
    patterns = config.prompts_files
    if not path.is_dir():
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", config.prompts) or path.suffix in SUFFIXES:
            raise UserError(f"prompts: no such file or folder: {config.prompts}")
        if not patterns:  # a dataset of images can be hundreds of gigabytes
            raise UserError(f"prompts: say which files of the hub dataset '{config.prompts}' in prompts_files")
        path = _from_hub(config.prompts, patterns)
    names = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES}
    # In the order of the patterns, so that max_prompts takes from the first.
    chosen = dict.fromkeys(n for pattern in patterns or ["*"] for n in names if fnmatch(n, pattern))
    if not chosen:
        wanted = f" that match {', '.join(patterns)}" if patterns else ""
        raise UserError(f"prompts: no {', '.join(SUFFIXES)} files{wanted} in {config.prompts}")
    return [names[n] for n in chosen]


def _from_hub(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # many kinds: offline, gated, no such repository
        raise UserError(
            f"prompts: '{name}' is no local file or folder, and the hub did not give it: {hub.reason(error)}"
        ) from None


def _read(file: Path, config: EvaluationConfig, category: str) -> list[dict[str, str]]:
    """Rows of one file; those without a prompt are left out."""
    try:
        if file.suffix == ".parquet":
            table = _parquet(file, config)
        elif file.suffix == ".txt":
            table = [{"prompt": line} for line in file.read_text(encoding="utf-8").splitlines()]
        elif file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, list) or not all(isinstance(r, (str, dict)) for r in content):
                raise ValueError("expected a list of texts or of objects")
            table = [r if isinstance(r, dict) else {"prompt": r} for r in content]
        else:
            with open(file, newline="", encoding="utf-8") as lines:
                table = list(csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"prompts: {file} is not readable ({str(error).splitlines()[0]})") from None
    if not table:
        return []
    column, of = _columns(list(table[0]), config, file)
    rows = []
    for row in table:
        if text := str(row.get(column) or "").strip():
            rows.append({"prompt": text, "category": str(row[of] or "") if of else category})
    return rows


def _parquet(file: Path, config: EvaluationConfig) -> list[dict[str, Any]]:
    """Only the columns that are asked for: Pick-a-Pic's files hold images too."""
    import pyarrow.parquet as pq

    wanted = _columns(pq.read_schema(file).names, config, file)
    return pq.read_table(file, columns=[c for c in wanted if c]).to_pylist()


def _columns(names: list[str], config: EvaluationConfig, file: Path) -> tuple[str, str | None]:
    """The names of the prompt column and of the category column, if one is asked for."""
    for key in (config.prompt_column, config.category_column):
        if key is not None and key not in names:
            raise UserError(f"prompts: {file} has no column '{key}'; it has {', '.join(names)}")
    lower = {name.lower(): name for name in reversed(names)}
    column = config.prompt_column or next((lower[c] for c in COLUMNS if c in lower), None)
    if column is None:
        raise UserError(f"prompts: {file} has none of the columns {', '.join(COLUMNS)}; name one in prompt_column")
    return column, config.category_column
