"""Sharded checkpoints: nothing in their table of contents is called. `test_parallel.py` loads them everywhere."""

import pytest
from parallel_cases import build
from torch.distributed.checkpoint.api import CheckpointException

from flashmhf.distributed.sharded import load_sharded
from flashmhf.errors import InputError


def test_a_hostile_table_of_contents_is_not_called(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch hit'\ntR.")
    with pytest.raises((InputError, CheckpointException), match=r"got: a pickle that calls os\.system"):
        load_sharded(tmp_path, build("flashmhf"))
