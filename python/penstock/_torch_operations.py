# SPDX-License-Identifier: Apache-2.0
"""What a call with torch tensors runs on: the engine's operators, or plain torch by name.

The two modules have the same functions: router_logits, logits_and_input, route, replay, plan,
experts. This is the only place that chooses between them. Used by functional.py and routers.py.
"""

from __future__ import annotations

from types import ModuleType

import torch

from penstock._context import refuse_transforms, torch_chosen

# Known to: 2.15. Known not to: 2.9. By its number, because looking would import torch._dynamo.
_COMPILER_READS_CONTEXTS = torch.__version__ >= (2, 15)


def operations() -> ModuleType:
    """The functions for the context in force."""
    refuse_transforms()
    if torch_is_chosen():
        from penstock import _torch_path

        return _torch_path
    from penstock import _torch_engine

    return _torch_engine


def torch_is_chosen() -> bool:
    """Whether plain torch operations are chosen by name.

    Inside torch.compile the compiler guards what is read of the context here, so that code is
    compiled again where the choice is another. Where the compiler cannot read it the answer is no,
    and the engine refuses to run what was compiled if torch is chosen then.
    """
    if torch.compiler.is_compiling() and not _COMPILER_READS_CONTEXTS:
        return False
    return torch_chosen()
