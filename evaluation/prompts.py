"""Reads prompts and their categories from files or a hub dataset."""

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

COLUMNS = ("prompt", "caption", "text")  # tried in this order, ignoring case
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


def read_prompts(config: EvaluationConfig) -> tuple[list[dict[str, Any]], int]:
    """([{prompt, category, categories}], number of repeated prompts), in the order of the files, each prompt once.

    `categories` are all categories of a prompt ("" if there are none), and `category` is the first of them.

    Raises UserError for a file that is missing, unreadable or without prompts, and for a missing column.
    """
    if config.prompts == "tiny":
        from tiny import world

        held_out = world.split_scenes()[1]
        found = [{"prompt": s.prompt(t), "category": s.shape} for t in range(len(world.TEMPLATES)) for s in held_out]
    else:
        files = _files(config)
        tables = [_read(file, config) for file in files]
        # With several files each is a category, unless every prompt has its own text file (DPG-Bench).
        alone = all(file.suffix == ".txt" and len(table) <= 1 for file, table in zip(files, tables, strict=True))
        named = len(files) > 1 and not alone
        found = [
            {"prompt": row["prompt"], "category": file.stem if named and row["category"] is None else row["category"]}
            for file, table in zip(files, tables, strict=True)
            for row in table
        ]
    unique: dict[str, list[str]] = {}
    for row in found:
        own = unique.setdefault(row["prompt"], [])
        given = row["category"] if isinstance(row["category"], list) else [row["category"]]
        own += [name for name in map(_text, given) if name not in own]
    if not unique:
        raise UserError(f"prompts: not a single prompt in {config.prompts}")
    rows = [{"prompt": p, "category": (c or [""])[0], "categories": c or [""]} for p, c in unique.items()]
    return rows[: config.max_prompts], len(found) - len(unique)


def _files(config: EvaluationConfig) -> list[Path]:
    path = Path(config.prompts)
    if path.is_file():
        return [path]
    patterns = config.prompts_files
    if not path.is_dir():
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", config.prompts) or path.suffix in SUFFIXES:
            raise UserError(f"prompts: no such file or folder: {config.prompts}")
        if not patterns:  # an image dataset can have hundreds of gigabytes
            raise UserError(f"prompts: say which files of the hub dataset '{config.prompts}' in prompts_files")
        path = _from_hub(config.prompts, patterns)
    names = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES}
    # In the order of the patterns, so that max_prompts takes prompts from the first ones.
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


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell)


def _read(file: Path, config: EvaluationConfig) -> list[dict[str, Any]]:
    """{prompt, category} of each row that has a prompt. The category is the unchanged value, None without a column."""
    try:
        if file.suffix == ".parquet":
            table = _parquet(file, config)
        elif file.suffix == ".txt":
            table = [{"prompt": line} for line in file.read_text(encoding="utf-8").splitlines()]
        elif file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            table = _objects(content)
        elif file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8").splitlines()
            table = _objects([json.loads(line) for line in lines if line.strip()])
        else:
            with open(file, newline="", encoding="utf-8-sig") as handle:
                table = list(csv.DictReader(handle, delimiter="\t" if file.suffix == ".tsv" else ","))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"prompts: {file} is not readable ({str(error).splitlines()[0]})") from None
    if not table:
        return []
    column, of = _columns(list(table[0]), config, file)
    rows = []
    for row in table:
        if text := str(row.get(column) or "").strip():
            rows.append({"prompt": text, "category": None if of is None else "" if row.get(of) is None else row[of]})
    return rows


def _objects(content: Any) -> list[dict[str, Any]]:
    """The rows of a JSON list. Raises ValueError if it is not a list of texts or objects."""
    if not isinstance(content, list) or not all(isinstance(r, (str, dict)) for r in content):
        raise ValueError("expected a list of texts or of objects")
    return [r if isinstance(r, dict) else {"prompt": r} for r in content]


def _parquet(file: Path, config: EvaluationConfig) -> list[dict[str, Any]]:
    """The rows of a parquet file. Reads only the columns needed, because Pick-a-Pic's files contain images too."""
    import pyarrow.parquet as pq

    wanted = _columns(pq.read_schema(file).names, config, file)
    return pq.read_table(file, columns=[c for c in wanted if c]).to_pylist()


def _columns(names: list[str], config: EvaluationConfig, file: Path) -> tuple[str, str | None]:
    """The names of the prompt column and of the category column (None if not configured)."""
    for key in (config.prompt_column, config.category_column):
        if key is not None and key not in names:
            raise UserError(f"prompts: {file} has no column '{key}'; it has {', '.join(names)}")
    lower = {str(name).lower(): name for name in reversed(names)}
    column = config.prompt_column or next((lower[c] for c in COLUMNS if c in lower), None)
    if column is None:
        raise UserError(f"prompts: {file} has none of the columns {', '.join(COLUMNS)}; name one in prompt_column")
    return column, config.category_column
