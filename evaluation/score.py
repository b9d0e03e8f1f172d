"""Step 2: scores every image with every judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from evaluation.processes import processes
from evaluation.protocol import EvaluationConfig
from evaluation.scorers import Scorer, check_endpoints, check_scorers, load_scorer
from evaluation.tables import image_key, read_index, read_scores, scores_path, write_scores
from ncp.common.errors import UserError

ROUND = 32  # batches per process, after which the scores so far are written


def score(config: EvaluationConfig) -> None:
    """Scores the images that have no score yet. Several processes share the batches."""
    rows = read_index(config)
    check_scorers(config, [r["prompt"] for r in rows])
    path = scores_path(config)
    done = read_scores(config) if path.exists() else []
    state = processes()
    if state.is_main_process:
        print(f"{len(rows)} images x {len(config.scorers)} scorers: {', '.join(config.scorers)}")
    wanted = {image_key(r) for r in rows}
    done = [r for r in done if image_key(r) in wanted]  # drops scores of images that are not in the index
    todo = {name: unscored(name, rows, done) for name in config.scorers}
    refuse_absent_servers(config, [name for name, own in todo.items() if own], state)
    for name, own in todo.items():
        batches = [own[i : i + config.batch_size] for i in range(0, len(own), config.batch_size)]
        mine = batches[state.process_index :: state.num_processes]
        bar = tqdm(total=sum(map(len, mine)), desc=name, unit="image", disable=not (mine and state.is_main_process))
        scorer: Scorer | None = None
        for start in range(0, len(batches), ROUND * state.num_processes):
            part = batches[start : start + ROUND * state.num_processes][state.process_index :: state.num_processes]
            scored: list[dict[str, Any]] = []
            try:
                if part:
                    scorer = scorer or load_scorer(name, config, state.device)
                    score_batches(scorer, part, config, scored, bar)
            except UserError as error:  # sent to all processes, so that none waits for this one
                scored.append({"error": str(error)})
            gathered = gather_object(scored)
            added = [r for r in gathered if "error" not in r]
            done += added
            if added and state.is_main_process:  # an interrupted or failed run continues from here
                write_scores(config, done)
            if errors := [r["error"] for r in gathered if "error" in r]:
                bar.close()
                raise UserError(errors[0])
        bar.close()
    if state.is_main_process:
        print(f"wrote {path}; next: evaluate.py compare")


def refuse_absent_servers(config: EvaluationConfig, names: list[str], state: Any) -> None:
    """Raises UserError, in every process, if the first one cannot reach the server of one of these scorers."""
    errors: list[str] = []
    try:
        if state.is_main_process:
            check_endpoints(config, names)
    except UserError as error:  # sent to all processes, as above
        errors.append(str(error))
    if errors := gather_object(errors):
        raise UserError(errors[0])


def unscored(name: str, rows: list[dict[str, Any]], done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the index that have no score by this scorer in `done`."""
    known = {image_key(r) for r in done if r["scorer"] == name}
    return [r for r in rows if image_key(r) not in known]


def score_batches(
    scorer: Scorer, batches: list[list[dict[str, Any]]], config: EvaluationConfig, rows: list[dict[str, Any]], bar: Any
) -> None:
    """Appends a row of the score table per image to `rows`, batch by batch: after a failure earlier ones are kept."""
    for batch in batches:
        images = []
        for row in batch:
            try:
                images.append(Image.open(Path(config.output_dir) / row["file"]).convert("RGB"))
            except (OSError, SyntaxError) as error:
                raise UserError(f"{row['file']} is no readable image ({error}); delete it and run generate") from None
        scores = np.asarray(scorer.score(images, [r["prompt"] for r in batch]), dtype=np.float64)
        if scores.shape != (len(batch),):
            raise UserError(
                f"scorer '{scorer.name}' gave {scores.shape} scores for {len(batch)} images; expected one each"
            )
        rows += [{**r, "scorer": scorer.name, "score": float(s)} for r, s in zip(batch, scores, strict=True)]
        bar.update(len(batch))
