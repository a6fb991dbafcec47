"""A small recurrent language model as an ONNX graph with the inputs and outputs of an export, and the same in numpy.

It is no Mamba: per layer one running mean over a window of d_conv inputs and one decaying state, enough to see whether
a session carries what it must. The last layer has other sizes than the first.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

V, SIZES = 23, ((3, 4, 5), (2, 4, 1))  # per layer: window before the token, d_inner, d_state
DECAY = 0.7


def weights(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "embedding": draw.standard_normal((V, SIZES[0][1])).astype(np.float32),
        "head": draw.standard_normal((SIZES[0][1], V)).astype(np.float32),
        **{f"spread_{i}": draw.standard_normal((n, 1)).astype(np.float32) for i, (_, _, n) in enumerate(SIZES)},
    }


def naive_logits(tokens, seed=0):
    """(B, L, V), one token at a time, from the recurrence as it is written down here."""
    w = weights(seed)
    out = np.zeros((*tokens.shape, V), np.float64)
    for b, row in enumerate(tokens):
        windows = [np.zeros((k, d)) for k, d, _ in SIZES]
        states = [np.zeros((n, d)) for _, d, n in SIZES]
        for t, token in enumerate(row):
            x = w["embedding"][token].astype(np.float64)
            for i, (_, _, n) in enumerate(SIZES):
                windows[i] = np.vstack([windows[i], x])
                u = np.tanh(windows[i].mean(axis=0))
                windows[i] = windows[i][1:]
                states[i] = DECAY * states[i] + w[f"spread_{i}"] * u
                x = x + states[i].sum(axis=0) / n
            out[b, t] = x @ w["head"]
    return out


def _value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def _step_body(index, d_inner, window):
    """One token of a layer: (state, window, x_t) -> (state, window, y_t), masked by m_t."""
    n = SIZES[index][2]
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["x", "axis1"], ["x_row"]),
        node("Concat", ["conv", "x_row"], ["all"], axis=1),
        node("ReduceMean", ["all", "axis1"], ["mean"], keepdims=1),
        node("Tanh", ["mean"], ["u"]),
        node("Mul", ["u", f"spread_{index}"], ["drive"]),
        node("Mul", ["ssm", "decay"], ["old"]),
        node("Add", ["old", "drive"], ["ssm_run"]),
        node("Slice", ["all", "one", "many", "axis1"], ["conv_run"]),
        node("Where", ["real", "ssm_run", "ssm"], ["ssm_next"]),
        node("Where", ["real", "conv_run", "conv"], ["conv_next"]),
        node("ReduceSum", ["ssm_next", "axis1"], ["read"], keepdims=0),
        node("Div", ["read", "states"], ["scaled"]),
        node("Add", ["x", "scaled"], ["y"]),
    ]
    constants = [
        ("axis1", np.array([1])),
        ("one", np.array([1])),
        ("many", np.array([10**6])),
        ("decay", np.float32(DECAY)),
        ("states", np.float32(n)),
    ]
    return helper.make_graph(
        nodes,
        f"layer_{index}",
        [
            _value("ssm", ["batch", n, d_inner]),
            _value("conv", ["batch", window, d_inner]),
            _value("x", ["batch", d_inner]),
            _value("real", ["batch", 1, 1], TensorProto.BOOL),
        ],
        [
            _value("ssm_next", ["batch", n, d_inner]),
            _value("conv_next", ["batch", window, d_inner]),
            _value("y", ["batch", d_inner]),
        ],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants],
    )


def model(all_logits=False, seed=0, dtype=TensorProto.FLOAT):
    node, nodes, w = helper.make_node, [], weights(seed)
    inputs = [_value(name, ["batch", "length"], TensorProto.INT64) for name in ("input_ids", "attention_mask")]
    outputs = [_value("logits", ["batch", "length" if all_logits else 1, V])]
    nodes += [
        node("Gather", ["embedding", "input_ids"], ["x_0"]),
        node("Cast", ["attention_mask"], ["mask_bool"], to=TensorProto.BOOL),
        node("Unsqueeze", ["mask_bool", "axes23"], ["mask"]),
    ]
    for i, (window, d_inner, n) in enumerate(SIZES):
        inputs += [_value(f"past_conv_{i}", ["batch", window, d_inner]), _value(f"past_ssm_{i}", ["batch", n, d_inner])]
        outputs += [
            _value(f"present_conv_{i}", ["batch", window, d_inner]),
            _value(f"present_ssm_{i}", ["batch", n, d_inner]),
        ]
        nodes.append(
            node(
                "Scan",
                [f"past_ssm_{i}", f"past_conv_{i}", f"x_{i}", "mask"],
                [f"present_ssm_{i}", f"present_conv_{i}", f"x_{i + 1}"],
                body=_step_body(i, d_inner, window),
                num_scan_inputs=2,
                scan_input_axes=[1, 1],
                scan_output_axes=[1],
            )
        )
    last = f"x_{len(SIZES)}"
    if not all_logits:
        nodes.append(node("Slice", [last, "minus_one", "many", "one"], ["last"]))
        last = "last"
    nodes.append(node("MatMul", [last, "head"], ["logits"]))
    constants = {"axes23": [2, 3], "minus_one": [-1], "many": [10**6], "one": [1]}
    initializers = [numpy_helper.from_array(np.array(v), k) for k, v in constants.items()]
    initializers += [numpy_helper.from_array(v, k) for k, v in w.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def save(folder, made=None, config=True):
    """As an export lies in a folder: the weights as external data."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        model() if made is None else made,
        folder / "model.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="model.onnx.data",
        size_threshold=100,
    )
    if config:
        (folder / "config.json").write_text(json.dumps({"model_type": "mamba", "vocab_size": V, "eos_token_id": 0}))
    return folder
