# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models with the engine's experts.

    report = penstock.hf.patch(model)      # every MoE block of a loaded model, in place
    print(report)                          # what was replaced, what was refused and why
    penstock.hf.unpatch(model)

    penstock.hf.register()                 # or by name, through transformers' own registry
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="penstock")

Needs transformers 5.14 or newer only where its registry is used: patch() goes by structure.
"""

from __future__ import annotations

from penstock.hf._convert import CONVERTERS
from penstock.hf._patch import Report, Row, patch, unpatch
from penstock.hf._registry import register

__all__ = ["CONVERTERS", "Report", "Row", "patch", "register", "unpatch"]
