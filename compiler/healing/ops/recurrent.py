"""LSTM, GRU and RNN, step by step: each input's gate order, both directions, all forms of state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .call import Call, Op, Tensor

# Activations of each operator where the node names none: of the gates, then of what they let through.
_USUAL = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def recurrent(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Y [T, directions, N, hidden], the last H and, of an LSTM, the last C, both [directions, N, hidden].

    Raises:
        ValueError: a form that no exporter writes for networks as they are trained.
    """
    kind, hidden, directions = call.node.op_type, r.shape[-1], w.shape[0]
    names = list(call.get("activations", ())) or _USUAL[kind] * directions
    batch_first = bool(call.get("layout", 0))
    unusual = {
        "peepholes": peepholes is not None,
        "clip": "clip" in call.node.attributes,
        "input_forget": bool(call.get("input_forget", 0)),
        "layout": batch_first,
        "sequence_lens": lengths is not None and not bool((lengths == x.shape[0]).all()),
        "activations": any(name.lower() not in _ACTIVATIONS for name in names),
    }
    if any(unusual.values()):
        raise ValueError(", ".join(name for name, found in unusual.items() if found))
    functions = [_ACTIVATIONS[name.lower()] for name in names]
    each = len(_USUAL[kind])
    zeros = torch.zeros((x.shape[1], hidden), dtype=x.dtype)
    bias = torch.zeros((directions, 2 * _GATES[kind] * hidden), dtype=x.dtype) if b is None else b
    ys, hs, cs = [], [], []
    for d in range(directions):
        backwards = call.get("direction", "forward") == "reverse" or d == 1
        # The part of X is one product for all steps.
        steps = (x.flip(0) if backwards else x) @ w[d].t()
        state = [zeros if h is None else h[d], zeros if c is None else c[d]]
        w_bias, r_bias = bias[d].chunk(2)
        found = []
        for step in steps.unbind(0):
            state = _STEPS[kind](call, step + w_bias, state, r[d], r_bias, functions[d * each :])
            found.append(state[0])
        ys.append(torch.stack(found[::-1] if backwards else found))
        hs.append(state[0])
        cs.append(state[1])
    return torch.stack(ys, 1), torch.stack(hs), torch.stack(cs)


def _rnn(call: Call, x: Tensor, state: list[Tensor], r: Tensor, bias: Tensor, act: list[Any]) -> list[Tensor]:
    return [act[0](x + state[0] @ r.t() + bias), state[1]]


def _gru(call: Call, x: Tensor, state: list[Tensor], r: Tensor, bias: Tensor, act: list[Any]) -> list[Tensor]:
    h = state[0]
    (xz, xr, xn), (rz, rr, rn), (bz, br, bn) = x.chunk(3, -1), r.chunk(3), bias.chunk(3)
    z, reset = act[0](xz + h @ rz.t() + bz), act[0](xr + h @ rr.t() + br)
    if call.get("linear_before_reset", 0):
        new = act[1](xn + reset * (h @ rn.t() + bn))
    else:
        new = act[1](xn + (reset * h) @ rn.t() + bn)
    return [(1 - z) * new + z * h, state[1]]


def _lstm(call: Call, x: Tensor, state: list[Tensor], r: Tensor, bias: Tensor, act: list[Any]) -> list[Tensor]:
    i, o, f, new = (x + state[0] @ r.t() + bias).chunk(4, -1)
    c = act[0](f) * state[1] + act[0](i) * act[1](new)
    return [act[0](o) * act[2](c), c]


_STEPS = {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}
OPS: dict[str, Op] = {"GRU": recurrent, "LSTM": recurrent, "RNN": recurrent}
