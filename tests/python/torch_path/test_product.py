# SPDX-License-Identifier: Apache-2.0
"""The product of tests/cases/products.json in plain torch, against the float64 statement.

End to end: the statement gets the same rounded inputs and rounds nothing after that. One
combination in STRIDE of each dtype, which meets every value of every axis: the whole product is
the engine's, in ../cases/test_coverage.py.
"""

import pytest
from case_layer import MANY_ELEMENTS, TOLERANCES, declared, relative_l2, statement
from product import AXES, LAYER_AXES, PRODUCT, build, combinations, logits_gradient, run

SHAPE = [declared("shapes")["shapes"][PRODUCT["shape"]][key] for key in "TdnEK"]
STRIDE = 5  # has no factor in common with the length of an axis


def chosen(dtype):
    """The combinations of a dtype that are run."""
    return [choice for choice in combinations() if choice["dtype"] == dtype][::STRIDE]


def exact(choice, layer, logits):
    """Every result in float64."""
    expected = statement(layer.with_(dtype="float64"))
    if logits is not None:
        expected["dlogits"] = logits_gradient(
            choice["router"], logits, layer.scores, layer.ids, expected.pop("dscores")
        )
    return expected


def bound_for(elements, dtype):
    bound = TOLERANCES["end_to_end"][dtype]
    return bound if elements >= MANY_ELEMENTS else TOLERANCES["block_factor"] * bound


@pytest.mark.parametrize("dtype", AXES["dtype"])
def test_every_value_is_met(dtype):
    for axis, values in AXES.items():
        met = {choice[axis] for choice in chosen(dtype)}
        assert met == ({dtype} if axis == "dtype" else set(values)), axis


@pytest.mark.parametrize("activation", AXES["activation"])
@pytest.mark.parametrize("dtype", AXES["dtype"])
def test_product(dtype, activation):
    wrong, layers = [], {}
    for choice in chosen(dtype):
        if choice["activation"] != activation:
            continue
        key = tuple(choice[axis] for axis in LAYER_AXES)
        if key not in layers:
            layer, logits, _ = build(choice, SHAPE)
            layers[key] = layer, logits, exact(choice, layer, logits)
        layer, logits, expected = layers[key]
        got = run(choice, layer, logits)
        for name, want in expected.items():
            error = relative_l2(got[name].reshape(want.shape), want)
            if not error <= bound_for(want.size, dtype):
                wrong.append(f"{choice}: {name}: relative error {error:.2e}")
    assert layers
    assert not wrong, "\n".join(wrong[:20])
