"""Rows of metrics: complete, each step once, even after a kill or with corrupt lines."""

import json

from helpers import assert_says, logged

from minigpt_jax.runs.metrics import MetricsFile
from minigpt_jax.training.clock import Clock


def metrics_file(tmp_path, content, last_step):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    return MetricsFile(tmp_path, last_step), path


def test_rows_after_the_checkpoint_and_truncated_lines_are_dropped(tmp_path):
    complete = "".join(json.dumps({"step": step, "train_loss": 0.1 + 0.2}) + "\n" for step in (3, 6, 6, 9))
    for truncated in ("", "{", '{"step": 5, "train_l', '{"step": 5}'[:-1]):
        file, path = metrics_file(tmp_path, complete + truncated, last_step=6)
        assert path.read_text() == complete[: complete.index('{"step": 9')]
        file.append({"step": 7, "val_loss": 1.0})
        assert path.read_text().endswith('6, "train_loss": 0.30000000000000004}\n{"step": 7, "val_loss": 1.0}\n')


def test_a_corrupt_row_is_skipped_with_a_warning(tmp_path, caplog):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4, 5)]
    for corrupt in ('{"step": 2,}\n', "5\n", '{"stdp": 2}\n', "\n"):
        _, path = metrics_file(tmp_path, "".join([lines[0], corrupt, *lines[2:]]), last_step=4)
        assert path.read_text() == lines[0] + lines[2] + lines[3]
        assert_says(logged(caplog, "WARNING")[-1], str(path), "line 2")


def test_a_new_run_has_no_rows(tmp_path):
    _, path = metrics_file(tmp_path, '{"step": 3}\n', last_step=0)
    assert path.read_text() == ""


def test_a_lap_without_steps_repeats_the_previous_time_per_step():
    clock = Clock(0.0, step=5)
    first = clock.lap(6, None)
    assert clock.lap(6, None) == first > 0
    assert clock.lap(7, None) != first
