"""The gated delta rule, its gradients, and what it reads, in float64 numpy."""

import mlx.core as mx
import numpy as np

NAMES = ("q", "k", "v", "g", "beta", "state")
SEGMENT = 64

DECAYS = {
    "1": lambda rng, shape: np.ones(shape),
    "1e-6": lambda rng, shape: np.full(shape, 1e-6),
    "1e-6 beside 1": lambda rng, shape: rng.choice([1e-6, 1.0], shape),
    "from 1e-6 to 1": lambda rng, shape: 10 ** rng.uniform(-6, 0, shape),
    "one reset in a chunk of ones": lambda rng, shape: np.where(
        np.arange(shape[1])[None, :, None] == 40, 1e-6, np.ones(shape)
    ),
    "next to 1": lambda rng, shape: 1 - 10 ** rng.uniform(-6, -3, shape),
    "1e-30 beside 1": lambda rng, shape: rng.choice([1e-30, 1.0], shape),
}


def inputs(T, B=1, H=2, Dk=6, Dv=5, g=None, seed=0):
    """Arguments of gated_delta, in float64; ``g(rng, shape)`` draws the decays."""
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((B, T, H, Dk)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    return {
        "q": q * Dk**-0.5,
        "k": k,
        "v": rng.standard_normal((B, T, H, Dv)),
        "g": rng.uniform(0.5, 1, (B, T, H)) if g is None else g(rng, (B, T, H)),
        "beta": rng.uniform(0, 1, (B, T, H)),
        "state": rng.standard_normal((B, H, Dv, Dk)),
    }


def output_slopes(case, seed=1):
    """The gradients of some loss in y and in the last state."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(case[name].shape) for name in ("v", "state")]


def without_masked(case, mask):
    """The same with tokens that write nothing and decay nothing where the mask is False."""
    if mask is None:
        return case
    fill = {"q": 0, "k": 0, "v": 0, "g": 1, "beta": 0}
    case = dict(case)
    for name, value in fill.items():
        gate = mask.reshape(*mask.shape, *[1] * (case[name].ndim - 2))
        case[name] = np.where(gate, case[name], value)
    return case


def states(q, k, v, g, beta, state):
    """The state before each token, and the last one: ``[T + 1, B, H, Dv, Dk]``."""
    found = [state]
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None] * state
        error = v[:, t] - (state @ k[:, t, :, :, None])[..., 0]
        state = state + (beta[:, t, :, None] * error)[..., None] * k[:, t, :, None, :]
        found.append(state)
    return np.stack(found)


def checkpoints(every_state):
    """What the forward kernel writes: the state before each segment ``[B, H, N, Dv, Dk]``."""
    return np.moveaxis(every_state[:-1:SEGMENT], 0, 2)


def recurrence(q, k, v, g, beta, state):
    """y and the last state."""
    every_state = states(q, k, v, g, beta, state)
    return np.einsum("tbhvk,bthk->bthv", every_state[1:], q), every_state[-1]


def loss(case, dy, dstate):
    """The loss whose gradients ``output_slopes`` are."""
    y, state = recurrence(**case)
    return (y * dy).sum() + (state * dstate).sum()


def gradients(case, dy, dstate, mask=None):
    """The gradients of NAMES, backwards through the recurrence's three lines by hand."""
    case = without_masked(case, mask)
    q, k, v, g, beta, _ = case.values()
    if mask is not None:
        dy = np.where(mask[..., None, None], dy, 0)
    every_state = states(**case)
    slopes = {name: np.zeros_like(x) for name, x in case.items()}
    slope = dstate
    for t in reversed(range(q.shape[1])):
        decay, rate = g[:, t, :, None, None], beta[:, t, :, None]
        decayed = decay * every_state[t]
        error = v[:, t] - (decayed @ k[:, t, :, :, None])[..., 0]
        slope = slope + dy[:, t, :, :, None] * q[:, t, :, None, :]
        written = (slope @ k[:, t, :, :, None])[..., 0]
        slopes["q"][:, t] = (dy[:, t, :, None, :] @ every_state[t + 1])[..., 0, :]
        slopes["beta"][:, t] = (written * error).sum(-1)
        slopes["v"][:, t] = rate * written
        slopes["k"][:, t] = ((rate * error)[..., None, :] @ slope)[..., 0, :]
        slopes["k"][:, t] -= ((rate * written)[..., None, :] @ decayed)[..., 0, :]
        slope = slope - (rate * written)[..., None] * k[:, t, :, None, :]
        slopes["g"][:, t] = (slope * every_state[t]).sum((-1, -2))
        slope = decay * slope
    slopes["state"] = slope
    if mask is not None:
        for name in NAMES[:-1]:
            slopes[name][~mask] = 0
    return list(slopes.values())


def arrays(case, dtype=mx.float32):
    return {name: mx.array(x, dtype) for name, x in case.items()}


def weighted_sum(form, case):
    slopes = output_slopes(case)

    def loss(*values):
        return sum((x * mx.array(w, x.dtype)).sum() for x, w in zip(form(*values), slopes))

    return loss


def values_and_gradients(form, case, dtype=mx.float32):
    """y, the new state, and the gradient of each argument of some form in MLX, in numpy."""
    values = list(arrays(case, dtype).values())
    found = mx.grad(weighted_sum(form, case), argnums=tuple(range(6)))(*values)
    return [np.array(x) for x in (*form(*values), *found)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normed(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def plain(x):
    return None if x is None else np.array(x.astype(mx.float32), np.float64)


def from_projections(
    q, k, v, a, b, weights, past=None, offset=0, mask=None, lengths=None, rotation=None
):
    """What gated_delta_inputs returns for these arrays."""
    (B, T, H), (D,) = a.shape, weights.q_norm.shape
    q, k, v, a, b, past = map(plain, (q, k, v, a, b, past))
    if weights.convolution is None:
        past = None
    else:
        qkv = np.concatenate([q, k, v], axis=-1)
        if mask is not None:
            qkv = np.where(np.array(mask)[..., None], qkv, 0)
        taken = np.concatenate([plain(w)[..., 0] for w in weights.convolution])
        taps = taken.shape[1]
        if past is None:
            past = np.zeros((B, taps - 1, 3 * H * D))
        entries = np.concatenate([past, qkv], axis=1)
        qkv = sum(entries[:, j : j + T] * taken[:, j] for j in range(taps))
        q, k, v = np.split(qkv * sigmoid(qkv), 3, axis=-1)
        ends = np.full(B, T) if lengths is None else np.clip(np.array(lengths), 0, T)
        past = np.stack([x[end : end + taps - 1] for x, end in zip(entries, ends)])
    q, k, v = (x.reshape(B, T, H, D) for x in (q, k, v))
    q = normed(q, weights.norm_eps) * plain(weights.q_norm)
    k = normed(k, weights.norm_eps) * plain(weights.k_norm)
    if rotation is not None:
        offset = np.atleast_1d(np.array(offset))[:, None]
        positions = np.broadcast_to(offset + np.arange(T), (B, T)).astype(np.float32)
        # The angle is a float32 product in every implementation.
        angle = (positions[..., None] * np.array(rotation.frequencies)).astype(np.float64)
        cosine, sine = (rotation.scale * f(angle)[:, :, None] for f in (np.cos, np.sin))
        q, k = (
            np.concatenate([a * cosine - b * sine, a * sine + b * cosine], axis=-1)
            for a, b in (np.split(x, 2, axis=-1) for x in (q, k))
        )
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    g = np.exp(-np.exp(plain(weights.A_log)) * np.logaddexp(0, a + plain(weights.dt_bias)))
    return q * D**-0.5, k, v, g, sigmoid(b), past
