"""Every test runs in a folder of its own, so that run folders land there; one thread: the networks are small."""

import signal

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would our runs


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    """Tests that are not marked `cuda` run as on a machine without one, in processes that they start as well."""
    if request.node.get_closest_marker("cuda") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
