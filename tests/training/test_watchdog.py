"""Which process is to blame for a run that stands still."""

from flashmhf.training.watchdog import culprit


def test_a_process_that_no_longer_beats():
    assert culprit({0: (5, 9), 1: (4, 9)}, {0: (8, 9), 1: (4, 9)}) == "rank 1, which has stopped"


def test_a_process_that_beats_and_falls_behind():
    after = {0: (8, 9), 1: (7, 8), 2: (8, 9)}
    assert culprit(dict.fromkeys(after, (0, 0)), after) == "rank 1, which has the least progress"


def test_nobody_to_blame():
    after = {0: (8, 9), 1: (7, 9)}
    assert culprit({0: (1, 9), 1: (1, 9)}, after) == "an operation that all ranks are in, with equal progress"
