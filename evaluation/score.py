"""Step 2: every judge scores every image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from evaluation.processes import processes
from evaluation.protocol import EvaluationConfig
from evaluation.scorers import check_scorers, load_scorer
from evaluation.tables import image_key, read_index, read_scores, scores_path, write_scores
from ncp.common.errors import UserError


def score(config: EvaluationConfig) -> None:
    """Scores what is not scored yet. Several processes share the work by batches."""
    rows = read_index(config)
    check_scorers(config, [r["prompt"] for r in rows])
    path = scores_path(config)
    done = read_scores(config) if path.exists() else []
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
            write_scores(config, done)
    if state.is_main_process:
        print(f"wrote {path}; next: evaluate.py compare")


def score_batches(
    name: str, batches: list[list[dict[str, Any]]], config: EvaluationConfig, state: Any
) -> list[dict[str, Any]]:
    """Rows of the score table for this process's share."""
    if not batches:
        return []
    scorer = load_scorer(name, config, state.device)
    rows: list[dict[str, Any]] = []
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
