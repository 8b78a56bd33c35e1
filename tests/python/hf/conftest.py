# SPDX-License-Identifier: Apache-2.0
"""Leaves these tests out where transformers is not installed, and quietens its log."""

import importlib.util
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from a second thread, and lose much on a busy machine."""
    import torch

    import penstock

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with penstock.backend(threads=1):
        yield
    torch.set_num_threads(before)
