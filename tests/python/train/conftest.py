# SPDX-License-Identifier: Apache-2.0
"""The small text that the tests of `penstock train` learn from.

Nothing here looks at the standard library's source except to borrow one module's text. What is not
a fixture is in tiny.py, because a conftest cannot be imported by name: there are several.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from tiny import TINY

from penstock.train.data import Corpus, load_corpus


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "argparse.txt"
    path.write_text(inspect.getsource(argparse)[:40000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(text_file: Path) -> Corpus:
    return load_corpus((str(text_file),), TINY.sequence)
