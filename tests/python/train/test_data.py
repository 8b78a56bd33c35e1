# SPDX-License-Identifier: Apache-2.0
"""The split keeps its promises, and the n-gram marks are what their definition says."""

from __future__ import annotations

import math
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from penstock.train.baselines import bigram_loss, unigram_loss
from penstock.train.data import (
    SEPARATOR,
    evaluation_windows,
    load_corpus,
    stdlib_path,
    training_windows,
)
from penstock.train.errors import TrainError


def make_folder(root: Path, count: int, *, order: int = 1) -> Path:
    for i in range(count)[::order]:
        folder = root / f"part{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file{i:03d}.txt").write_text(f"<{i:03d}>" * (20 + i % 7))
    return root


def test_files_split_without_overlap_and_the_same_every_time(tmp_path: Path) -> None:
    first = load_corpus((str(make_folder(tmp_path / "a", 60)),), 16)
    second = load_corpus((str(make_folder(tmp_path / "b", 60, order=-1)),), 16)
    assert first.fingerprint == second.fingerprint
    assert bytes(first.train) == bytes(second.train)
    train = set(bytes(first.train).split(SEPARATOR))
    held_out = set(bytes(first.held_out).split(SEPARATOR))
    assert train and held_out and not train & held_out
    assert len(train) + len(held_out) == 60
    assert "by hash" in first.split
    share = len(first.held_out) / (len(first.train) + len(first.held_out))
    assert 0.04 < share < 0.11


def test_a_copy_of_a_file_counts_once(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", 40)
    plain = load_corpus((str(root),), 16)
    for path in sorted(root.rglob("*.txt")):
        (root / ("copy-" + path.name)).write_bytes(path.read_bytes())
    copied = load_corpus((str(root),), 16)
    assert copied.num_files == plain.num_files == 40
    assert sorted(bytes(copied.held_out).split(SEPARATOR)) == sorted(
        bytes(plain.held_out).split(SEPARATOR)
    )


def test_few_files_hold_out_the_tail(tmp_path: Path) -> None:
    content = bytes(range(1, 251)) * 8
    path = tmp_path / "one.bin"
    path.write_bytes(content)
    corpus = load_corpus((str(path),), 16)
    assert bytes(corpus.train) + bytes(corpus.held_out) == content
    assert len(corpus.held_out) == 100


def test_hidden_files_links_and_caches_are_left_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", 40)
    plain = load_corpus((str(root),), 16).fingerprint
    (root / ".hidden").write_text("no" * 100)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "x.txt").write_text("no" * 100)
    (root / "link.txt").symlink_to(stdlib_path() / "os.py")
    (root / "loop").symlink_to(root)
    assert load_corpus((str(root),), 16).fingerprint == plain


def test_default_is_the_standard_library_without_tests() -> None:
    corpus = load_corpus((), 64)
    assert len(corpus.train) > 2_000_000 and len(corpus.held_out) > 100_000
    whole = bytes(corpus.train) + bytes(corpus.held_out)
    assert (stdlib_path() / "argparse.py").read_bytes() in whole


@pytest.mark.parametrize("make", ["missing", "empty", "short", "pipe"])
def test_unusable_data_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "data"
    if make == "empty":
        path.mkdir()
    elif make == "short":
        path.write_text("x" * 50)
    elif make == "pipe":
        os.mkfifo(path)
    with pytest.raises(TrainError, match="--data: got"):
        load_corpus((str(path),), 16)


def test_windows_are_a_function_of_seed_and_step() -> None:
    text = np.frombuffer(np.random.default_rng(0).bytes(1000), dtype=np.uint8)
    first = training_windows(text, (3, 5, 16), 7)
    assert first.shape == (5, 17)
    np.testing.assert_array_equal(first, training_windows(text, (3, 5, 16), 7))
    for other in (training_windows(text, (3, 5, 16), 8), training_windows(text, (4, 5, 16), 7)):
        assert not np.array_equal(first, other)
    whole = bytes(text)
    assert all(bytes(row.astype(np.uint8)) in whole for row in first)


def test_windows_reach_both_ends_of_the_text() -> None:
    text = np.arange(20, dtype=np.uint8)
    drawn = np.concatenate([training_windows(text, (0, 8, 16), step) for step in range(40)])
    assert set(drawn[:, 0]) == {0, 1, 2, 3} and drawn.max() == 19


def test_evaluation_windows_score_no_byte_twice() -> None:
    text = np.arange(200, dtype=np.uint8)
    for most in (1, 3, 12, 100):
        windows = evaluation_windows(text, 16, most)
        targets = windows[:, 1:].ravel().tolist()
        assert len(windows) == min(most, 12)
        assert len(set(targets)) == len(targets)


def test_ngram_losses_match_brute_force() -> None:
    rng = np.random.default_rng(1)
    train = rng.integers(97, 103, size=400, dtype=np.uint8)
    held_out = rng.integers(97, 105, size=120, dtype=np.uint8)
    windows = evaluation_windows(held_out, 10, 6)
    singles, pairs = Counter(train.tolist()), Counter(pairwise(train.tolist()))
    before = Counter(train[:-1].tolist())
    unigram, bigram = [], []
    for row in windows.tolist():
        for a, b in pairwise(row):
            unigram.append(-math.log((singles[b] + 1) / (len(train) + 256)))
            bigram.append(-math.log((pairs[a, b] + 1) / (before[a] + 256)))
    assert unigram_loss(train, windows) == pytest.approx(np.mean(unigram), rel=1e-12)
    assert bigram_loss(train, windows) == pytest.approx(np.mean(bigram), rel=1e-12)


def test_ngram_counts_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    train = np.random.default_rng(2).integers(0, 256, size=5000, dtype=np.uint8)
    windows = evaluation_windows(train, 10, 20)
    whole = unigram_loss(train, windows), bigram_loss(train, windows)
    monkeypatch.setattr("penstock.train.baselines._CHUNK", 7)
    assert (unigram_loss(train, windows), bigram_loss(train, windows)) == whole
