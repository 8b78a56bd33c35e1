# SPDX-License-Identifier: Apache-2.0
"""Every example of examples/python runs, and says what it should."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "python"
SAYS = {
    "01_loop.py": "rows of each expert",
    "02_functional.py": "NumPy: same bits: True",
    "03_module.py": "under autocast: torch.bfloat16",
    "04_hugging_face.py": "the same tokens after reloading: True",
    "05_lora.py": "saved, loaded and merged, the logits differ by",
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example(name):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert SAYS[name] in result.stdout
