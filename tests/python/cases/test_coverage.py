# SPDX-License-Identifier: Apache-2.0
"""The whole product of tests/cases/products.json, through the torch interface, on every backend.

Each combination runs forward and backward once and is compared with the float64 statement: output
and every gradient, the logits' included where a router of ours chose. The last tests tell what is
left out. The product itself is in product.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from case_layer import declared, far_from
from doors import EVERY_KIND
from product import AXES, LAYER_AXES, PRODUCT, STORAGE_AXES, build, combinations, run

import penstock

SHAPE = [declared("shapes")["shapes"][PRODUCT["shape"]][key] for key in "TdnEK"]


@pytest.mark.parametrize("activation", AXES["activation"])
@pytest.mark.parametrize(("backend", "dtype"), EVERY_KIND)
def test_product(backend: str, dtype: str, activation: str) -> None:
    """Every combination of this backend, dtype and activation."""
    wrong, statements = [], {}
    for choice in combinations():
        if (choice["dtype"], choice["activation"]) != (dtype, activation):
            continue
        key = tuple(choice[axis] for axis in LAYER_AXES)
        if key not in statements:
            statements[key] = build(choice, SHAPE)
        layer, logits, expected = statements[key]
        with penstock.backend(backend, threads=2):
            got = run(choice, layer, logits)
        wrong += [f"{choice}: {line}" for line in far_from(got, expected, dtype)]
    assert not wrong, "\n".join(wrong[:20])


def test_every_axis_is_used() -> None:
    """An axis that no code above reads would be counted but not tested."""
    assert set(LAYER_AXES) | set(STORAGE_AXES) == set(AXES)


def test_what_is_not_covered(capsys: pytest.CaptureFixture) -> None:
    """Every option of the interface is in the product, or listed here with the reason."""
    from penstock import modules
    from penstock.routing import ROUTERS

    outside = {
        ("save", "nothing"): "keeps nothing for backward; hostile case 27 compares its output",
    }
    options = {
        "activation": modules.ACTIVATIONS,
        "layout": modules.GATE_LAYOUTS,
        "save": modules.SAVE_POLICIES,
        "router": (*ROUTERS, "caller"),
        "dtype": ("float64", "float32", "bfloat16", "float16"),
    }
    missing = [
        (axis, value)
        for axis, values in options.items()
        for value in values
        if value not in AXES[axis] and (axis, value) not in outside
    ]
    total = int(np.prod([len(values) for values in AXES.values()]))
    run_count = len(combinations())
    with capsys.disabled():
        print(f"\nproduct: {run_count} of {total} combinations, on each backend of their dtype")
        for rule in PRODUCT["not_combined"]:
            print(f"  not combined: {rule['when']}: {rule['why']}")
        for (axis, value), why in outside.items():
            print(f"  not in the product: {axis} {value}: {why}")
        for backend in penstock.list_backends():
            if not backend.available:
                print(f"  backend {backend.name} not run: {backend.reason}")
    assert not missing, f"options without a place in the product: {missing}"
    assert run_count > 5000


def test_every_combination_is_counted_once() -> None:
    """Rules that exclude everything, or axes that repeat a value, would go unnoticed otherwise."""
    chosen = combinations()
    assert len({tuple(choice.values()) for choice in chosen}) == len(chosen)
    for axis, values in AXES.items():
        assert {choice[axis] for choice in chosen} == set(values), axis
