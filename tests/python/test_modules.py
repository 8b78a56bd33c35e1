# SPDX-License-Identifier: Apache-2.0
"""penstock.MoE and Experts: results, statistics, dtypes, copies, files, processes."""

import copy
import io
import multiprocessing
import pickle
import weakref

import plain
import pytest
import torch

import penstock
from penstock import losses

SIZES = (16, 8, 4, 2)


def make(**keywords):
    torch.manual_seed(0)
    layer = penstock.MoE(*SIZES, **keywords)
    return layer, torch.randn(3, 5, SIZES[0], dtype=keywords.get("dtype"))


def plain_layer(layer, x, activation="swiglu"):
    rows = x.reshape(-1, SIZES[0])
    logits = rows @ layer.router.weight.T
    scores, ids = plain.route(logits, SIZES[3], layer.router_kind)
    names = ("w1", "w2", "b1", "b2")
    weights = {k: getattr(layer.experts, k) for k in names if getattr(layer.experts, k) is not None}
    y = plain.experts(rows, weights, scores, ids, activation=activation)
    if layer.shared_expert is not None:
        shared = {k: getattr(layer.shared_expert, k) for k in weights}
        one = torch.zeros(len(rows), 1, dtype=torch.int64)
        y = y + plain.experts(rows, shared, torch.ones_like(one).to(y), one, activation=activation)
    return y.reshape(x.shape), logits, ids


@pytest.mark.parametrize("router", plain.ROUTERS)
@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_against_plain_torch(router, shared, bias):
    layer, x = make(router=router, shared_intermediate_size=shared, bias=bias, dtype=torch.float64)
    x.requires_grad_()
    expected, logits, ids = plain_layer(layer, x)
    y = layer(x)
    assert plain.relative_l2(y, expected) <= 1e-12
    counts = torch.bincount(ids.reshape(-1), minlength=SIZES[2])
    assert layer.stats.loads.tolist() == counts.tolist()
    inputs = [x, *layer.parameters()]
    loss = y.square().sum() + layer.stats.aux_loss + layer.stats.z_loss
    counts = counts.double()
    probabilities = logits.softmax(-1).mean(0)
    aux = SIZES[2] * (counts / counts.sum() * probabilities).sum()
    z = logits.logsumexp(-1).square().mean()
    got = torch.autograd.grad(loss, inputs)
    want = torch.autograd.grad(expected.square().sum() + aux + z, inputs)
    for a, b in zip(got, want, strict=True):
        assert plain.relative_l2(a, b) <= 1e-11


def test_losses_of_known_routings():
    even = torch.zeros(8, 4)
    assert losses.load_balancing_loss(even, torch.full((4,), 4)).item() == pytest.approx(1.0)
    skewed = torch.tensor([[50.0, 0, 0, 0]]).expand(8, 4)
    assert losses.load_balancing_loss(skewed, torch.tensor([8, 0, 0, 0])).item() == pytest.approx(4)
    assert losses.router_z_loss(even).item() == pytest.approx(torch.tensor(4.0).log().item() ** 2)
    assert losses.idle_experts(torch.tensor([3, 0, 0, 1])).item() == 2
    assert losses.load_imbalance(torch.tensor([8, 0, 0, 0])).item() == 4
    nothing = torch.zeros(0, 4)
    assert losses.load_balancing_loss(nothing, torch.zeros(4, dtype=torch.int32)).item() == 0
    assert losses.router_z_loss(nothing).item() == 0


def test_stats_weigh_the_losses_and_count_a_call_once():
    layer, x = make(aux_loss_coef=0.5, z_loss_coef=0.25)
    layer(x)
    stats = layer.stats
    want = 0.5 * stats.aux_loss + 0.25 * stats.z_loss
    assert torch.equal(stats.total_loss, want)
    assert int(stats.loads.sum()) == 3 * 5 * SIZES[3]
    layer(x[:1])
    assert int(layer.stats.loads.sum()) == 5 * SIZES[3]
    assert stats.idle_experts.item() == (stats.loads == 0).sum().item()
    unweighted, x = make()
    unweighted(x)
    assert unweighted.stats.total_loss.item() == 0.0


def test_a_call_begins_with_the_last_call_let_go():
    """A graph that stats kept would bind the router's gradient to the last call's stream."""
    layer, x = make()
    layer(x)
    last = weakref.ref(layer.stats.logits)
    alive = []
    layer.router.register_forward_pre_hook(lambda *_: alive.append(last() is not None))
    layer(x)
    assert alive == [False] and layer.stats is not None


def test_experts_alone():
    torch.manual_seed(0)
    experts = penstock.Experts(16, 8, 4, activation="gelu", bias=True, dtype=torch.float64)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    scores, ids = torch.rand(15, 2).double(), torch.randint(0, 4, (15, 2))
    weights = dict(experts.named_parameters())
    expected = plain.experts(x.reshape(15, 16), weights, scores, ids, activation="gelu")
    y = experts(x, scores, ids)
    assert y.shape == x.shape
    assert plain.relative_l2(y.reshape(15, 16), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers(dtype, tolerances):
    layer, x = make(dtype=dtype)
    wide = copy.deepcopy(layer).double()
    y = layer(x)
    expected = wide(x.double())
    assert y.dtype == dtype
    same = (layer.stats.loads == wide.stats.loads).all()
    assert same
    assert plain.relative_l2(y, expected) <= tolerances["end_to_end"][str(dtype).split(".")[1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, x_dtype):
    layer, x = make(bias=True, shared_intermediate_size=4)
    x = x.to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert layer.stats.logits.dtype == torch.float32
    y.float().square().sum().backward()
    assert x.grad.dtype == x_dtype
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    # The documented casts, by hand: the experts in the autocast dtype, the router in fp32.
    by_hand = copy.deepcopy(layer).to(dtype)
    by_hand.router = copy.deepcopy(layer.router)
    rows = x.detach().reshape(-1, SIZES[0])
    logits = layer.router(rows.float())
    routing = penstock.functional.route(logits, SIZES[3])
    expected = by_hand.experts(rows.to(dtype), routing)
    everyone = torch.tensor([len(rows)], dtype=torch.int32)
    expected = expected + by_hand.shared_expert.forward_rows(rows.to(dtype), everyone)
    assert torch.equal(y, expected.reshape(y.shape))


def test_autocast_leaves_float64_alone():
    layer, x = make(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x)) and layer(x).dtype == torch.float64


def test_fp32_router_in_a_bf16_layer():
    layer, x = make(dtype=torch.bfloat16)
    layer.router.float()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    want = penstock.functional.router_logits(x.reshape(-1, 16).float(), layer.router.weight)
    assert torch.equal(layer.stats.logits, want)


def test_mixed_dtypes_are_errors_that_name_both():
    layer, x = make(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16.*float32.*\.to\(dtype\)"):
        layer(x.float())
    layer.router.float()
    with pytest.raises(ValueError, match="dtype of w1: got bfloat16, expected float32"):
        layer(x.float())


@pytest.mark.parametrize(
    ("arguments", "keywords", "match"),
    [
        ((16, 8, 4, 5), {}, "top_k: got 5"),
        ((16, 8, 4, 0), {}, "top_k: got 0"),
        ((0, 8, 4, 2), {}, "hidden_size: got 0"),
        ((16, 8, 4, 2), {"activation": "tanh"}, "activation: got 'tanh'"),
        ((16, 8, 4, 2), {"router": "best"}, "router: got 'best'"),
        ((16, 8, 4, 2), {"gate_layout": "mixed"}, "gate_layout"),
        ((16, 8, 4, 2), {"save": "all"}, "save"),
        ((16, 8, 4, 2), {"shared_intermediate_size": -1}, "shared_intermediate_size"),
    ],
)
def test_settings_are_checked(arguments, keywords, match):
    with pytest.raises(ValueError, match=match):
        penstock.MoE(*arguments, **keywords)


def test_x_of_another_size():
    layer, x = make()
    with pytest.raises(ValueError, match="hidden_size"):
        layer(x[..., :7])


@pytest.mark.parametrize("shape", [(16,), (4, 16), (2, 1, 3, 16), (0, 16), (2, 0, 16)])
def test_any_leading_shape(shape):
    layer, _ = make()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def copies(layer):
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)
    loaded, _ = make(bias=True, shared_intermediate_size=4)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer))
    yield loaded


def test_copies_give_the_same_bits():
    layer, x = make(bias=True, shared_intermediate_size=4)
    y = layer(x)  # leaves stats, whose tensors could not be copied
    assert "router.weight" in layer.state_dict() and "experts.w1" in layer.state_dict()
    for other in copies(layer):
        assert other.stats is None
        assert torch.equal(other(x), y)


def _child(layer, x, queue):
    y = layer(x)
    y.sum().backward()
    queue.put((y.detach().numpy(), layer.experts.w1.grad.numpy()))


def _use_then_fork() -> None:
    torch.set_num_threads(1)  # torch's own pool does not survive a fork
    layer, x = make()
    with penstock.backend(threads=2):
        y = layer(x)
        y.sum().backward()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_child, args=(copy.deepcopy(layer), x, queue))
        process.start()
        child_y, child_grad = queue.get(timeout=60)
        process.join(timeout=60)
    assert process.exitcode == 0
    assert torch.equal(torch.from_numpy(child_y), y.detach())
    assert child_grad.shape == layer.experts.w1.shape


def test_fork_after_use():
    """In a process of its own: where autograd has started threads for other devices, as opcheck
    makes it do, torch refuses backward passes in forked children.
    """
    process = multiprocessing.get_context("spawn").Process(target=_use_then_fork)
    process.start()
    process.join(timeout=180)
    process.kill()
    assert process.exitcode == 0


def test_activations_reach_the_engine():
    for activation in plain.ACTIVATIONS:
        layer, x = make(activation=activation, dtype=torch.float64, bias=True)
        assert plain.relative_l2(layer(x), plain_layer(layer, x, activation)[0]) <= 1e-12


def test_meta_device_then_materialised():
    layer = penstock.MoE(*SIZES, device="meta").to_empty(device="cpu")
    for module in (layer.router, layer.experts):
        module.reset_parameters()
    assert layer(torch.randn(2, SIZES[0])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_x_by_router_and_experts_meet_in_one_product(dtype):
    """As separate calls sum them, but for roundings; also where one of the two has none."""
    torch.manual_seed(3)
    layer = penstock.MoE(24, 16, 4, 2, dtype=dtype)
    x = torch.randn(30, 24, dtype=dtype, requires_grad=True)

    def gradient(output):
        return torch.autograd.grad(output.float().square().sum(), x, allow_unused=True)[0]

    logits, routing = layer.route(x)
    want = gradient(layer.experts(x, routing))
    got = gradient(layer(x))
    tolerance = 1e-6 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    # x used once more outside, and a loss of the logits alone, without the experts' gradient.
    got_twice = gradient(torch.cat((layer(x), x)))
    torch.testing.assert_close(got_twice, got + 2 * x.detach(), rtol=tolerance, atol=tolerance)
    layer(x)
    (of_loss,) = torch.autograd.grad(layer.stats.z_loss, x)
    z_loss = layer.route(x)[0].logsumexp(dim=-1).square().mean()
    (want,) = torch.autograd.grad(z_loss, x)
    torch.testing.assert_close(of_loss, want, rtol=tolerance, atol=tolerance)
    assert torch.count_nonzero(want) > 0


def test_a_frozen_router_or_input_keeps_the_other_gradient():
    torch.manual_seed(4)
    layer, x = penstock.MoE(24, 16, 4, 2), torch.randn(30, 24, requires_grad=True)
    layer(x).square().sum().backward()
    want_x, want_router = x.grad, layer.router.weight.grad
    x.grad = None
    layer.router.weight.requires_grad_(False)
    layer(x).square().sum().backward()
    assert torch.equal(x.grad, want_x)
    layer.zero_grad()
    layer.router.weight.requires_grad_(True)
    layer(x.detach()).square().sum().backward()
    assert torch.equal(layer.router.weight.grad, want_router)
