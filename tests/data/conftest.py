"""No test of this folder reaches the network or this machine's own data sets."""

import pytest
import torch


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setenv("KDBENCH_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KDBENCH_DATA", raising=False)
