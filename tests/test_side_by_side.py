import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from mlx_lm.tuner.lora import LoRALinear

from mlx_hydra.models import side_by_side
from mlx_hydra.models.side_by_side import SideBySide


def linear(outputs, bias=False, seed=0, dtype=mx.float32):
    layer = nn.Linear(64, outputs, bias=bias)
    layer.weight = mx.random.normal((outputs, 64), key=mx.random.key(seed)).astype(dtype)
    if bias:
        layer.bias = mx.random.normal((outputs,), key=mx.random.key(seed + 1)).astype(dtype)
    return layer


def quantized(outputs, bits=4, bias=False, seed=0):
    return nn.QuantizedLinear.from_linear(linear(outputs, bias, seed), 32, bits)


def lora(outputs, seed=0):
    layer = LoRALinear.from_base(linear(outputs, seed=seed), r=2)
    for name in ("lora_a", "lora_b"):
        layer[name] = mx.random.normal(layer[name].shape, key=mx.random.key(seed))
    return layer


def other_bias(outputs):
    layer = linear(outputs, True, dtype=mx.float16)
    layer.bias = layer.bias.astype(mx.float32)
    return layer


X = mx.random.normal((2, 3, 64), key=mx.random.key(9))

LAYERS = {
    "one": lambda: [linear(5)],
    "of one with a bias": lambda: [linear(5, True)],
    "plain": lambda: [linear(32, seed=1), linear(5, seed=2), linear(64, seed=3)],
    "some with a bias": lambda: [linear(32), linear(5, True, 2), linear(64, True, 4)],
    "quantized": lambda: [quantized(32), quantized(64, bias=True, seed=1), quantized(8, seed=2)],
    "plain after quantized": lambda: [quantized(32), quantized(64), linear(5), linear(5)],
    "of many bits": lambda: [quantized(32, 4), quantized(64, 8), quantized(32, 4)],
    "lora among them": lambda: [linear(32), lora(16), linear(8), linear(4)],
    "a bias of another type": lambda: [
        linear(8, dtype=mx.float16),
        other_bias(8),
        linear(8, dtype=mx.float16),
    ],
    "of two types": lambda: [linear(8), linear(8, dtype=mx.float16), linear(8)],
}


def separately(layers, x=X):
    return mx.concatenate([layer(x) for layer in layers], axis=-1)


def biased(found, together, layers):
    """What a joined product gives, without the zeros behind it and with all biases."""
    biases = together.biases(layers)
    sizes = [layer(X).shape[-1] for layer in layers]
    found = mx.split(found, [sum(sizes[: i + 1]) for i in range(len(sizes))], axis=-1)
    return mx.concatenate([x if b is None else x + b for x, b in zip(found, biases)], axis=-1)


def width_of(layers):
    return separately(layers).shape[-1]


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_it_gives_what_the_layers_give_one_by_one(make):
    layers, expected = make(), separately(make())
    together = SideBySide()
    width = width_of(layers)
    found = together(X, layers)
    assert tiny.distance(biased(found, together, layers), expected) < 1e-4
    assert found.shape[-1] - width < 8
    assert not found[..., width:].any()
    assert tiny.distance(separately(layers), expected) < 1e-4
    assert tiny.distance(biased(together(X[:1], layers), together, layers), expected[:1]) < 1e-4
    rows = X.flatten(0, 1)
    unbiased = together.unbiased(rows, layers, X.shape[:2])
    for outputs in (
        together.apart(X, layers),
        together.one_by_one(X, layers),
        [x if b is None else x + b for x, b in zip(unbiased, together.biases(layers))],
    ):
        assert [x.shape for x in outputs] == [layer(X).shape for layer in make()]
        assert tiny.distance(mx.concatenate(outputs, axis=-1), expected) < 1e-4
        assert [x.dtype for x in outputs] == [layer(X).dtype for layer in make()]


@pytest.mark.parametrize(
    "name, products", [("plain", 1), ("quantized", 1), ("plain after quantized", 2)]
)
def test_neighbours_of_a_kind_are_one_product(name, products, monkeypatch):
    layers, together = LAYERS[name](), SideBySide()
    together(X, layers)
    calls = []
    for kind in (nn.Linear, nn.QuantizedLinear, side_by_side._Product):
        run = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda self, x, run=run: calls.append(self) or run(self, x)
        )
    together(X, layers)
    assert len(calls) == products


def test_nothing_is_held_twice():
    layers, together = [linear(4096, seed=i) for i in range(3)], SideBySide()
    mx.eval([layer.parameters() for layer in layers])
    before = mx.get_active_memory()
    mx.eval(together(X, layers))
    assert mx.get_active_memory() - before < layers[0].weight.nbytes / 2


def test_weights_that_were_replaced_are_taken_up():
    layers, together = LAYERS["some with a bias"](), SideBySide()

    def assert_right():
        assert tiny.distance(biased(together(X, layers), together, layers), separately(layers)) < (
            1e-4
        )

    assert_right()
    layers[1].weight = layers[1].weight + 1
    assert_right()
    layers[2].bias = layers[2].bias + 1
    assert_right()
    layers[0] = quantized(32)
    assert_right()


def test_weights_that_stay_are_joined_once(monkeypatch):
    layers, together = LAYERS["plain"](), SideBySide()
    together(X, layers)
    known = together._known
    together(X, layers)
    assert together._known is known


def test_two_threads_join_the_same_layers_once(monkeypatch):
    layers, together = LAYERS["plain after quantized"](), SideBySide()
    expected = separately(layers)
    mx.eval(expected)
    join, joins, both = side_by_side._join, [], threading.Event()

    def slow(group):
        # Long enough for the other thread to come here, if it may.
        both.wait(0.5) if not joins else both.set()
        joins.append(group)
        return join(group)

    monkeypatch.setattr(side_by_side, "_join", slow)

    def run(_):
        with mx.stream(mx.cpu):
            found = together(X, layers)[..., : width_of(layers)]
            mx.eval(found)
            return tiny.distance(found, expected)

    with ThreadPoolExecutor(2) as threads:
        assert max(threads.map(run, range(2))) < 1e-4
    assert len(joins) == 2
    assert run(None) < 1e-4


def nodes_of(function, x):
    """The graph that a function of x builds, but for broadcasts."""
    names = []
    mx.export_function(lambda node: names.append(node.get("name")), function, x)
    return [name for name in names if name not in (None, "Broadcast")]


@pytest.mark.parametrize("name", ["some with a bias", "quantized", "one", "of one with a bias"])
def test_a_product_is_one_node(name):
    make, together = LAYERS[name], SideBySide()
    layers = make()
    together(X[0], layers)
    # No bias is added, no weight is turned, and nothing sliced.
    product = "QuantizedMatmul" if name == "quantized" else "Matmul"
    assert nodes_of(lambda x: together(x, layers), X[0]) == [product]
    each = nodes_of(lambda x: together.one_by_one(x, layers), X[0])
    if name == "of one with a bias":
        assert each == ["AddMM"]
    elif name != "quantized":
        assert sorted(each) == ["AddMM"] * (len(layers) - 1) + ["Matmul"]


def test_what_stands_in_for_a_layer_is_called():
    class Recorder:
        def __init__(self, layer):
            self.layer, self.seen = layer, []

        def __call__(self, x):
            self.seen.append(x)
            return self.layer(x)

    recorder, together = Recorder(linear(5, True)), SideBySide()
    assert mx.array_equal(together.apart(X, [recorder])[0], recorder.layer(X))
    assert recorder.seen


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,), (1, 3)], ids=str)
@pytest.mark.parametrize("name", ["even", "uneven", "padded"])
def test_even_parts_of_one_row_are_rows(name, shape):
    sizes = {"even": [32, 32, 32], "uneven": [32, 32, 64], "padded": [5, 5, 5]}[name]
    layers, together = [linear(n, seed=i) for i, n in enumerate(sizes)], SideBySide()
    x = mx.random.normal((*shape, X.shape[-1]))
    expected, found = [layer(x) for layer in layers], together.apart(x, layers)
    assert all(tiny.distance(x, y) < 1e-4 for x, y in zip(found, expected))
    if name == "even" and shape[-1] == 1:
        mx.eval(found)
        assert all(memoryview(part).strides[-2] == 4 * 32 for part in found)


@pytest.mark.parametrize("count", [9, 10, 11, 13])
@pytest.mark.parametrize("last", [64, 5])
def test_many_parts_are_split_off_as_few(count, last):
    layers = [linear(8 * i, seed=i) for i in range(1, count)] + [linear(last)]
    expected, together = [layer(X) for layer in layers], SideBySide()
    found = together.apart(X, layers)
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert all(tiny.distance(x, y) < 1e-4 for x, y in zip(found, expected))
    nodes = nodes_of(lambda x: together.apart(x, layers), X[0])
    parts = count + (last % 8 > 0)
    assert nodes == ["Matmul", "Split"] + ["Slice"] * (0 if parts <= 10 else count - 9)


@pytest.mark.parametrize("last", [64, 5])
def test_parts_are_split_off_at_once(last):
    layers, together = [linear(32), linear(last)], SideBySide()
    together(X, layers)
    assert nodes_of(lambda x: together.apart(x, layers), X[0]) == ["Matmul", "Split"]
