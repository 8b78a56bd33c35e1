# SPDX-License-Identifier: Apache-2.0
"""Makes `experts_implementation="penstock"` known to transformers."""

from __future__ import annotations

from penstock.hf._experts import experts_forward

NAME = "penstock"


def register() -> None:
    """Enter the engine in transformers' registry of experts implementations, once or again.

    Afterwards `AutoModel.from_pretrained(..., experts_implementation="penstock")` and
    `model.set_experts_implementation("penstock")` work. ImportError names the version needed.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "penstock.hf.register: got no registry of experts in transformers, expected "
            "transformers 5.14 or newer. Run pip install 'penstock[hf]'"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
