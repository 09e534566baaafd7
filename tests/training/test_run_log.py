"""The log of a run tells of every start, and survives a kill in the middle of a line."""

import json

import pytest

from flashmhf.training.run_log import LOG_FILE, read_log


def write(folder, *lines):
    (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_without_a_log_there_are_no_rows(tmp_path):
    log = read_log(tmp_path)
    assert (log.rows, log.starts, log.lost_steps) == ([], [], 0)


def test_time_in_training_leaves_out_what_was_lost_and_what_lay_between(tmp_path):
    write(
        tmp_path,
        {"start": 0, "time": 100.0},
        {"step": 1, "time": 101.0, "loss": 5.0},
        {"step": 10, "time": 110.0, "loss": 4.0},
        {"step": 17, "time": 117.0, "loss": 3.5},
        {"start": 10, "time": 500.0},
        {"step": 17, "time": 508.0, "loss": 3.4},
        {"step": 20, "time": 511.0, "loss": 3.0, "eval_loss": 3.1},
    )
    log = read_log(tmp_path)
    assert log.curve("loss") == [(1, 5.0), (10, 4.0), (17, 3.4), (20, 3.0)]
    assert log.curve("loss", "elapsed_s") == [(1.0, 5.0), (10.0, 4.0), (18.0, 3.4), (21.0, 3.0)]
    assert log.curve("eval_loss") == [(20, 3.1)]
    assert [start.step for start in log.starts] == [0, 10]
    assert log.lost_steps == 7


@pytest.mark.parametrize("truncated", ['{"step": 3, "ti', '{"step": 3, "time": 4.0}', "\x00\x00"])
def test_a_truncated_line_loses_only_itself(tmp_path, truncated):
    from flashmhf.training.run_log import _add

    write(tmp_path, {"start": 0, "time": 1.0}, {"step": 2, "time": 3.0, "loss": 2.0})
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write(truncated)
    _add(tmp_path, {"start": 2, "time": 10.0})
    _add(tmp_path, {"step": 5, "time": 12.0, "loss": 1.0})
    assert read_log(tmp_path).curve("loss", "elapsed_s") == [(2.0, 2.0), (4.0, 1.0)]
