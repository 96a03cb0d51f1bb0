from __future__ import annotations

import pytest

from hflow_fast.errors import ConfigError
from hflow_fast.training import TrainConfig
from hflow_fast.training.intervals import INTERVALS, Interval

from .tiny import tiny_config


def times(interval: Interval, steps: range, seconds_per_step: float = 1.0) -> list[int]:
    due = []
    for step in steps:
        if interval.due(step, step * seconds_per_step):
            due.append(step)
            interval.restart(step, step * seconds_per_step)
    return due


def test_steps_are_counted_from_the_start_of_the_run() -> None:
    assert times(Interval(4, 0.0), range(1, 13)) == [4, 8, 12]


def test_hours_are_counted_from_the_last_time() -> None:
    assert times(Interval(None, 2.5), range(1, 12)) == [3, 6, 9]


@pytest.mark.parametrize("interval", [Interval(4, 0.0), Interval(None, 3.5)])
def test_a_resume_changes_nothing(interval: Interval) -> None:
    whole = times(Interval(interval._steps, interval._seconds), range(1, 30))
    first = times(interval, range(1, 10))
    resumed = Interval(interval._steps, interval._seconds)
    resumed.load_state_dict(interval.state_dict())
    assert first + times(resumed, range(10, 30)) == whole


def test_intervals_of_a_configuration() -> None:
    config = tiny_config() | {"OUTPUT": {"CHECKPOINT_EVERY_STEPS": 7, "VISUALIZATION_EVERY": 2.0}}
    output = TrainConfig.from_config(config).output
    first = {name: [step for step in range(1, 10) if Interval.from_config(name, output).due(step, step * 3600.0)][:1]
             for name in INTERVALS}
    assert first == {"checkpoint": [7], "visualization": [2], "metrics": [4]}


@pytest.mark.parametrize("name", INTERVALS)
def test_hours_and_steps_together_are_refused_by_name(name: str) -> None:
    keys = f"{name.upper()}_EVERY", f"{name.upper()}_EVERY_STEPS"
    with pytest.raises(ConfigError, match=rf"OUTPUT: {keys[0]} \(hours\) and {keys[1]} are both given"):
        TrainConfig.from_config(tiny_config() | {"OUTPUT": dict.fromkeys(keys, 4)})


def test_a_multiple_is_due_once() -> None:
    interval = Interval(10, 3600.0)
    assert interval.due(10, 0.0) and interval.due(11, 0.0)  # also where the step itself was not looked at
    interval.restart(10, 0.0)
    assert not interval.due(10, 0.0) and not interval.due(19, 0.0) and interval.due(20, 0.0)
