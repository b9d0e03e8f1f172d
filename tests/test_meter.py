"""Figures between two log entries, by hand."""

import json

import pytest
import torch
from accelerate import Accelerator
from runs import as_a_process

from ncp.training import meter
from ncp.training.meter import Meter


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    return clock


@pytest.fixture
def accelerator() -> Accelerator:
    with as_a_process():
        return Accelerator(cpu=True)


def first_entry(figures: Meter, clock: Clock) -> None:
    """Two steps of 3 s and 1 s, of two pairs each; a minute between them is not training."""
    figures.start()
    figures.add({"loss": torch.tensor([1.0, 3.0]), "grad_norm": torch.tensor(5.0), "skipped_steps": False}, samples=2)
    clock.now += 3
    figures.stop()
    clock.now += 60
    figures.start()
    figures.add({"loss": torch.tensor([4.0, 8.0]), "skipped_steps": True}, samples=2)
    clock.now += 1
    figures.stop()


FIRST = {"loss": 4.0, "grad_norm": 5.0, "skipped_steps": 0.5, "samples_per_second": 1.0}  # (2 + 6) / 2; 4 pairs in 4 s


def test_meter_averages_between_log_entries(clock, accelerator):
    figures = Meter({})
    first_entry(figures, clock)
    said = figures.flush(accelerator)
    assert said.pop("peak_memory_gib") > 0.05  # of this process, with torch in it
    assert said == FIRST
    # The next entry knows nothing of it: 1 pair in half a second.
    figures.start()
    figures.add({"loss": torch.tensor([10.0])}, samples=1)
    clock.now += 0.5
    figures.stop()
    said = figures.flush(accelerator)
    assert said["loss"] == 10 and "grad_norm" not in said and said["samples_per_second"] == 2
    assert figures.seconds == 4.5


def test_a_resumed_meter_goes_on_as_if_it_had_not_ended(clock, accelerator):
    """Stopped between two log entries, and read back from a manifest, which is JSON."""
    figures = Meter({})
    first_entry(figures, clock)
    again = Meter(json.loads(json.dumps(figures.state(accelerator))))
    for each in (figures, again):
        each.start()
        each.add({"loss": torch.tensor([7.0])}, samples=6)
        clock.now += 1
        each.stop()
    said, resumed = (each.flush(accelerator) for each in (figures, again))
    # (2 + 6 + 7) / 3; 10 pairs in 5 s.
    assert said["loss"] == resumed["loss"] == 5 and said["samples_per_second"] == resumed["samples_per_second"] == 2
    assert said.keys() == resumed.keys() and resumed["grad_norm"] == 5 and again.seconds == figures.seconds == 5
