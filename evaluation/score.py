"""Step 2: every judge scores every image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.protocol import Config, index_schema, processes, read_index, read_table, write_table
from evaluation.scorers import check_scorers, load_scorer, source_of
from ncp.common.errors import UserError


def score(config: Config) -> None:
    """Scores what is not scored yet. Several processes share the work by batches."""
    rows = read_index(config)
    check_scorers(config, [r["prompt"] for r in rows])
    path = Path(config.output_dir) / "scores.parquet"
    done = read_scores(config)[0] if path.exists() else []

    from accelerate.utils import gather_object

    state = processes()
    if state.is_main_process:
        print(f"{len(rows)} images x {len(config.scorers)} scorers: {', '.join(config.scorers)}")
    wanted = {image_key(r) for r in rows}
    done = [r for r in done if image_key(r) in wanted]  # what the index no longer lists is forgotten
    for name in config.scorers:
        known = {image_key(r) for r in done if r["scorer"] == name}
        todo = [r for r in rows if image_key(r) not in known]
        if not todo:
            continue
        batches = [todo[i : i + config.batch_size] for i in range(0, len(todo), config.batch_size)]
        own = batches[state.process_index :: state.num_processes]
        try:
            scored = score_batches(name, own, config, state)
        except UserError as error:  # told to all, so that no process waits for one that is gone
            scored = [{"error": str(error)}]
        scored = gather_object(scored)
        if errors := [r["error"] for r in scored if "error" in r]:
            raise UserError(errors[0])
        done += scored
        if state.is_main_process:  # after each scorer: an interrupted run continues with the next
            write_table(sorted(done, key=lambda r: (r["scorer"], r["file"])), path, score_schema(config))
    if state.is_main_process:
        print(f"wrote {path}; next: evaluate.py compare")


def image_key(row: dict[str, Any]) -> tuple[str, str]:
    """Which image a row is about: its file, as drawn with those weights."""
    return row["file"], row["weights"]


def score_batches(name: str, batches: list[list[dict]], config: Config, state: Any) -> list[dict[str, Any]]:
    """Rows of the score table for this process's share."""
    import numpy as np
    from PIL import Image

    if not batches:
        return []
    scorer, rows = load_scorer(name, config, state.device), []
    bar = tqdm(total=sum(map(len, batches)), desc=name, unit="image", disable=not state.is_main_process)
    for batch in batches:
        images = []
        for row in batch:
            try:
                images.append(Image.open(Path(config.output_dir) / row["file"]).convert("RGB"))
            except (OSError, SyntaxError) as error:
                raise UserError(f"{row['file']} is no readable image ({error}); delete it and run generate") from None
        scores = np.asarray(scorer.score(images, [r["prompt"] for r in batch]), dtype=np.float64)
        if scores.shape != (len(batch),):
            raise UserError(f"scorer '{name}' gave {scores.shape} scores for {len(batch)} images; expected one each")
        rows += [{**r, "scorer": name, "score": float(s)} for r, s in zip(batch, scores, strict=True)]
        bar.update(len(batch))
    bar.close()
    return rows


def score_schema(config: Config) -> Any:
    """Columns of the score table; its metadata say by which protocol and with which judges it came to be."""
    import pyarrow as pa

    noted = {"protocol": config.protocol(), "scorers": {name: source_of(name, config) for name in config.scorers}}
    path = Path(config.output_dir) / "scores.parquet"
    if path.exists():
        noted["scorers"] = {**_noted(read_table(path, "score"))["scorers"], **noted["scorers"]}
    columns = [*index_schema(), pa.field("scorer", pa.string()), pa.field("score", pa.float64())]
    return pa.schema(columns, metadata={"noted": json.dumps(noted)})


def read_scores(config: Config) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(rows of the score table, scorer to checkpoint).

    Raises UserError if it is of another protocol than the config's, or a scorer's checkpoint is another now.
    """
    path = Path(config.output_dir) / "scores.parquet"
    table = read_table(path, "score")
    noted = _noted(table)
    if changed := [key for key, value in config.protocol().items() if noted["protocol"].get(key) != value]:
        raise UserError(f"{path}: the scores are of another protocol ({', '.join(changed)}); remove it and score again")
    for name in config.scorers:
        if (was := noted["scorers"].get(name)) not in (None, now := source_of(name, config)):
            raise UserError(
                f"{path}: scores of '{name}' are by {was}, the config says {now}; remove it and score again"
            )
    return table.to_pylist(), noted["scorers"]


def _noted(table: Any) -> dict[str, Any]:
    try:
        return json.loads((table.schema.metadata or {})[b"noted"])
    except (KeyError, ValueError):
        raise UserError("scores.parquet was not written by evaluate.py score; remove it and score again") from None
