"""What stops a run or skips a step: signals, the time limit, losses that are not finite, winner drift.

All processes decide together, once per step. Exit statuses: `INTERRUPTED` if the same command can continue the run,
`DIVERGED` if it would only diverge again.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from ncp.common.errors import DIVERGED, INTERRUPTED, Stopped
from ncp.losses import SATURATED, Metrics
from ncp.training.checkpoints import last_good, writing
from ncp.training.meter import stacked
from ncp.training.models import Models
from ncp.training.pairs import Pairs
from ncp.training.samples import PairDataset, collate, to_device
from ncp.training.settings import TrainingConfig

SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, n))  # Windows: no USR1
STARTED = time.monotonic()
MOST_SATURATED = 0.75  # share of the first step's pairs
ONE_KEYSTROKE = 2.0  # seconds: the terminal and the launcher may both send the signal of one Ctrl-C

# The objective of a script: (models, policy, batch, config) -> (losses (B,), metrics).
Objective = Callable[[Models, torch.nn.Module, dict[str, Any], Any], tuple[torch.Tensor, Metrics]]


class Abandoned(Exception):
    """Work of one process was left unfinished, because a signal or the time limit ends the run."""


class Guard:
    """Watches a run. `stopped` is None, or the reason why the run ends after this step.

    saved: the manifest of the checkpoint that the run resumes from, or empty.
    owes_look: an evaluation of the held-out pairs was interrupted, in this run or in the one that it resumes.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, pairs: Pairs, saved: dict[str, Any]):
        self.config, self.accelerator, self.pairs = config, accelerator, pairs
        self.stopped: Stopped | None = None
        self.owes_look = bool(saved.get("owes_look"))
        self._signal, self._signalled_at = 0, 0.0
        self._in_a_row, self._warned, self._stepped = 0, False, False
        self._losses: list[torch.Tensor] = []
        self._saturated: list[torch.Tensor] = []
        self._indices: list[int] = []
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        if not self._signal:
            self._signal, self._signalled_at = number, time.monotonic()
        elif time.monotonic() - self._signalled_at > ONE_KEYSTROKE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def add(self, batch: dict[str, Any], losses: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        """Records a micro-batch: its pairs, their losses (B,), and which of them are `saturated` (B,)."""
        self._losses.append(losses.detach())
        self._saturated.append(metrics.get("saturated", torch.zeros_like(losses)))
        self._indices += batch["pair"]

    def check_step(self, step: int, grad_norm: torch.Tensor) -> bool:
        """Whether this step may be taken: its losses and its gradient are finite on all processes.

        If not, the step is reported and counted. After `max_skipped_steps` such steps in a row the run is stopped. The
        same small reduction also decides, for all processes, whether a signal or the time limit ends the run after
        this step.
        """
        losses, indices, self._stepped = torch.cat(self._losses), self._indices, True
        saturated = torch.cat(self._saturated).mean() > MOST_SATURATED
        self._losses, self._saturated, self._indices = [], [], []
        bad_loss, bad_gradient, starts_saturated = self._agree(
            step, ~losses.isfinite().all(), ~torch.as_tensor(grad_norm).isfinite(), saturated
        )
        if starts_saturated and step == 1:
            self._say(
                f"warning: the run starts saturated: |logit| is above {SATURATED:g} for more than {MOST_SATURATED:.0%} "
                "of the pairs, which then hardly count; choose a smaller beta"
            )
        if not (bad_loss or bad_gradient):
            self._in_a_row = 0
            return True
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.update()  # lowers the loss scale, as after a step
            if not bad_loss and scaler.get_scale() >= 1:
                return False  # the gradient scaler lowers its scale until nothing overflows
        self._in_a_row += 1
        self._report(step, losses, indices, grad_norm)
        if self._in_a_row >= self.config.max_skipped_steps:
            self._diverged(step, f"{self._in_a_row} steps in a row had a loss or gradient that is not finite")
        return False

    def _agree(self, step: int, *flags: torch.Tensor | bool) -> list[bool]:
        """Whether each flag is set on any process; also decides whether the run ends after this step. All call it."""
        device, limit = self.accelerator.device, self.config.max_train_hours
        # Never before the first step: each start of a run takes at least one.
        late = limit is not None and self._stepped and time.monotonic() - STARTED >= limit * 3600
        own = stacked([*flags, late, self._signal], device)  # the host waits once, for `found`
        *found, late, number = self.accelerator.gather(own).view(-1, len(own)).amax(0).tolist()
        if (number or late) and self.stopped is None:
            why = f"by {signal.Signals(int(number)).name}" if number else f"after max_train_hours ({limit:g})"
            there = Path(self.config.output_dir) / f"checkpoint-{step}"
            self.stopped = Stopped(
                f"stopped {why} at step {step}; resume_from_checkpoint: latest goes on from {there}", INTERRUPTED
            )
        return [bool(f) for f in found]

    def together(self, step: int, work: Iterator[Any]) -> bool:
        """Does this process's share of some work, piece by piece. False if a signal or the time limit ends it.

        Before each piece all processes decide together whether to continue, so that a signal to one of them stops all.
        A piece should take seconds. A share may be empty. step: the last finished step.
        """
        more, end = True, object()
        while self.stopped is None:
            (busy,) = self._agree(step, more)
            if not busy:
                return True
            if self.stopped is None and more:
                more = next(work, end) is not end
        return False

    def between(self, step: int) -> None:
        """Called by a process that works alone, between pieces of its work, while the others wait in `together`.

        Raises Abandoned if a signal or the time limit ends the run.
        """
        self._agree(step, True)
        if self.stopped is not None:
            raise Abandoned

    def _report(self, step: int, losses: torch.Tensor, indices: list[int], grad_norm: torch.Tensor) -> None:
        """Reports the pairs whose loss is not finite (all, if only the gradient is not), on screen and in a file."""
        found = gather_object(list(zip(indices, losses.tolist(), strict=True)))
        if not self.accelerator.is_main_process:
            return
        suspects = [(p, loss) for p, loss in found if not abs(loss) < float("inf")] or found
        named = [{**self.pairs.name(p), "loss": loss} for p, loss in suspects]
        file = Path(self.config.output_dir) / "skipped_steps.jsonl"
        with writing(file.parent), open(file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "grad_norm": float(grad_norm), "pairs": named}) + "\n")
        first = ", ".join(f"{n['source']} ({n['winner']} over {n['loser']}, loss {n['loss']:g})" for n in named[:3])
        rest = f" and {len(named) - 3} more" if len(named) > 3 else ""
        self._say(f"step {step} skipped: gradient norm {float(grad_norm):g}; suspects: {first}{rest}; all in {file}")

    def watch(self, step: int, heldout: HeldOut | None) -> dict[str, float]:
        """Metrics of the held-out pairs if due, else {}. Warns or ends the run if the winner drift is too high.

        Also {} if the evaluation was interrupted (`owes_look`).
        """
        if heldout is None or step % self.config.heldout_steps:
            return {}
        figures, most = heldout.figures(self, step), self.config.max_winner_drift
        self.owes_look = not figures
        if self.owes_look:
            return {}
        drift = figures["heldout_winner_drift"]
        text = f"the median held-out winner's loss is {drift:.1%} above the original model's"
        if most is not None and not drift <= most:  # or NaN
            self._diverged(step, f"{text} (max_winner_drift {most:.1%})")
        bad = not drift <= self.config.warn_winner_drift
        if bad and not self._warned:
            self._say(f"warning: at step {step} {text}: collapse looks like this (README, Reading the metrics)")
        self._warned = bad
        return figures

    def state(self) -> dict[str, Any]:
        """The guard's entries in a checkpoint's manifest."""
        return {"owes_look": self.owes_look}

    def _diverged(self, step: int, why: str) -> None:
        left = last_good(Path(self.config.output_dir))  # the checkpoint of this step is not written yet
        self.stopped = Stopped(f"stopped at step {step}: {why}; {left}; checkpoint-{step} is as it stopped", DIVERGED)

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Restores the signal handlers. Raises Stopped if the run was stopped."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.stopped is not None:
            raise self.stopped


class HeldOut:
    """The held-out pairs: their losses under fixed noise, compared with the original model's (which a reference
    with `reference_decay` leaves: it would hide a collapse). They are never trained on.

    objective: the script's. The processes share the pairs.
    """

    def __init__(
        self,
        objective: Objective,
        models: Models,
        dataset: PairDataset,
        config: TrainingConfig,
        accelerator: Accelerator,
    ):
        self.objective, self.models, self.dataset = objective, models, dataset
        self.config, self.accelerator = config, accelerator
        self.share = range(accelerator.process_index, dataset.pairs.heldout, accelerator.num_processes)
        self.original = self._joined(list(self._losses(models.base)))

    def _losses(self, unet: torch.nn.Module) -> Iterator[torch.Tensor]:
        """Yields, for each batch of this process, the losses of winners and losers (2, n); without losers (1, n)."""
        for i in range(0, len(self.share), self.config.train_batch_size):
            samples = [self.dataset.heldout(k) for k in self.share[i : i + self.config.train_batch_size]]
            batch = to_device(collate(samples), self.accelerator)
            with torch.no_grad():
                _, metrics = self.objective(self.models, unet, batch, self.config)
            yield torch.stack([metrics[k] for k in ("policy_w", "policy_l") if k in metrics])

    def _joined(self, found: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(found, dim=1) if found else torch.zeros(self.dataset.images, 0, device=self.accelerator.device)

    def figures(self, guard: Guard, step: int) -> dict[str, float]:
        """heldout_winner_drift: relative rise of the median winner's loss. heldout_accuracy (not for SFT): share of
        pairs whose winner improved more than its loser. Both are the same for any number of processes. {} if the guard
        ended the evaluation."""
        found: list[torch.Tensor] = []
        if not guard.together(step, map(found.append, self._losses(self.models.unet))):
            return {}
        drift = self._joined(found) - self.original
        relative = drift[0] / self.original[0].clamp_min(torch.finfo(drift.dtype).tiny)
        figures = {"heldout_winner_drift": median(gather_object(relative.tolist()))}
        if len(drift) == 2:
            figures["heldout_accuracy"] = fmean(gather_object((drift[0] < drift[1]).tolist()))
        return figures
