"""Worker processes of a data loader that die or cannot pass on a batch: one line, and no waiting for ever."""

import os

import pytest
import torch

from flashmhf.data.workers import loading_in_workers
from flashmhf.errors import RunError


class Full:
    """Stands in for a tensor for which shared memory has no space."""

    def __reduce__(self):
        raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")


class Data(torch.utils.data.Dataset):
    def __init__(self, get):
        self.get = get

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.get()


@pytest.mark.parametrize("get", [Full, lambda: os._exit(1), lambda: os.abort()], ids=["full", "exit", "abort"])
def test_a_worker_that_cannot_go_on(get):
    loader = torch.utils.data.DataLoader(Data(get), num_workers=1, batch_size=None, timeout=60)
    expected = "dataloader-num-workers: a worker process ended unexpectedly"
    with pytest.raises(RunError, match=expected), loading_in_workers():
        next(iter(loader))


def test_other_errors_pass():
    def fail():
        raise KeyError("nothing")

    loader = torch.utils.data.DataLoader(Data(fail), num_workers=1, batch_size=None)
    with pytest.raises(KeyError), loading_in_workers():
        next(iter(loader))
    with loading_in_workers():
        assert list(torch.utils.data.DataLoader(Data(lambda: 1), num_workers=1, batch_size=None)) == [1] * 8
