"""Every test runs in a folder of its own, so that run folders land there; one thread: the networks are small."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
