"""Policies without PyTorch: from the `model.pt` of either training script to one C header, or to ONNX.

    python export_policy.py runs/.../model.pt --out policy.h
    python export_policy.py runs/.../model.pt --out policy.onnx

Observation in, action out, without noise, as `load_actor` gives it. docs/export.md has a complete example.
"""

import contextlib
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import tyro

import rnm_td3_continuous as rnm
import td3_continuous as td3
from rnm_td3_continuous import Actor, NMLinear, UsageError


@dataclass
class Args:
    model: Annotated[str, tyro.conf.Positional]  # path of a `model.pt`
    out: str | None = None  # file to write, by default policy.h or policy.onnx
    format: Literal["c", "onnx"] | None = None  # by default what the ending of --out says, .h or .onnx; else c
    name: str = "policy"  # prefix of all names in the C header


def read_policy(path: str) -> tuple[Actor, dict[str, str]]:
    """Actor of a model file of either script, and what it is, in words. Raises UsageError of any of the scripts."""
    dense = False
    with contextlib.suppress(Exception):  # `read_model` says what is wrong
        dense = torch.load(path, map_location="cpu", weights_only=True)["format"] == td3.MODEL_FORMAT
    actor, model = td3.read_model(path) if dense else rnm.read_model(path, "masked")
    if not all(tensor.isfinite().all() for tensor in actor.state_dict().values()):
        raise UsageError(f"{path}: NaN or infinity among its weights; export another one")
    args, layers = model["args"], linear_layers(actor)
    for layer in layers:
        if isinstance(layer, NMLinear):
            layer.m = min(layer.m, layer.in_features)  # of larger ones, C has no constants
            layer.n = min(layer.n, layer.m)
            groups = torch.arange(layer.index.shape[1]) // layer.n
            if (layer.index // layer.m != groups).any() or (layer.index.diff() <= 0).any():
                raise UsageError(f"{path}: its indices are not {layer.n}:{layer.m}; export another one")
    git, commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], ""
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    words = {
        "environment": args["env_id"],
        "pattern": "dense" if dense else f"{args['n']}:{args['m']}",
        "active_weights": f"{100 * rnm.density(actor):.1f} %",
        "layers": " - ".join(str(size) for size in (layers[0].in_features, *(layer.out_features for layer in layers))),
        "exported": f"{date.today()} by export_policy.py, commit {commit or 'unknown'}",
    }
    # it comes from a file, and is to stand in a comment
    return actor, {key: re.sub(r"[^\w .,:%-]", "_", str(word), flags=re.ASCII) for key, word in words.items()}


def linear_layers(actor: Actor) -> list[nn.Linear | NMLinear]:
    return [layer for layer in actor.net if isinstance(layer, nn.Linear | NMLinear)]


# ---------------------------------------------------------------- C


SELECTED = {*range(2, 9)}  # M for which conditions were faster than loads


def c_table(name: str, entries: torch.Tensor) -> tuple[str, int]:
    """A constant of the smallest type, and how many bytes it has."""
    numbers = entries.detach().numpy().ravel()
    if numbers.dtype == np.float32:
        kind, size, texts = "float", 4, [f"{number!s}f" for number in numbers]  # NumPy's is exact, and the shortest
    else:
        size = next(size for size in (1, 2, 4) if numbers.max() < 256**size)
        kind, texts = {1: "unsigned char", 2: "unsigned short", 4: "unsigned"}[size], map(str, numbers)
    body = textwrap.fill(", ".join(texts), 120, break_on_hyphens=False)
    return f"static const {kind} {name}[] = {{\n{body}}};\n", size * len(numbers)


def c_pick(name: str, m: int) -> str:
    """Input k of a group of m. Compilers vectorise nested conditions but no load from an address that they compute."""
    declarations, names, bit = [", ".join(f"a{i} = w[{i}]" for i in range(m))], [f"a{i}" for i in range(m)], 1
    while len(names) > 1:
        pairs, letter = [names[i : i + 2] for i in range(0, len(names), 2)], chr(ord(names[0][0]) + 1)
        names = [f"{letter}{i}" for i in range(len(pairs))]
        chosen = (f"{new} = k & {bit} ? {pair[-1]} : {pair[0]}" for new, pair in zip(names, pairs, strict=True))
        declarations, bit = [*declarations, ", ".join(chosen)], 2 * bit
    select = "".join(f"    const float {line};\n" for line in declarations) + f"    return {names[0]};\n"
    body = "    return w[k];\n"
    if m in SELECTED:
        body = f"#ifdef {'__AVX2__' if m <= 4 else '__AVX512F__'}\n{select}#else\n{body}#endif\n"
    return f"static inline float {name}_pick{m}(const float *w, unsigned k)\n{{\n{body}}}\n"


def c_layer(name: str, i: int, layer: nn.Linear | NMLinear) -> tuple[list[str], list[tuple[str, int]]]:
    """Lines that compute y from x, and tables, column by column: the inner loops, over neurons, can be vectorised."""
    columns, rows = layer.in_features, layer.out_features
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.values  # [rows, active]
    active, pattern, factor, pointers, step = weight.shape[1], "dense", "x[{0}]", [], f"v += {4 * rows}"
    tables = [c_table(f"{name}_bias{i}", layer.bias), c_table(f"{name}_weight{i}", weight.T)]
    if isinstance(layer, NMLinear):
        pattern, first = f"{layer.n}:{layer.m}", torch.arange(active) // layer.n * layer.m  # column of each group
        tables += [c_table(f"{name}_offset{i}", (layer.index - first).T)]
        kind = tables[-1][0].removeprefix("static ").split(f" {name}_offset")[0]
        pointers, step = [f"{kind} *k{i} = {name}_offset{i};"], f"{step}, k{i} += {4 * rows}"
        factor = f"{name}_pick{layer.m}(x + {{0}} / {layer.n} * {layer.m}, k{i}[r + {{1}}])"

    def add(count: int, at: str) -> list[str]:
        """y += some columns of W times their x."""
        terms = [f"v[r + {j * rows}] * {factor.format(at.format(j), j * rows)}" for j in range(count)]
        return [f"for (r = 0; r < {rows}; r++)", "    y[r] += " + "\n          + ".join(terms) + ";"]

    whole, rest = active // 4 * 4, active % 4
    lines = ["", f"/* {columns} inputs, {rows} neurons, {pattern} */", *pointers, f"v = {name}_weight{i};"]
    lines += [f"for (r = 0; r < {rows}; r++) y[r] = {name}_bias{i}[r];"]
    if whole:
        loop = "\n".join(add(4, "(i + {0})"))
        lines += [f"for (i = 0; i < {whole}; i += 4, {step})", textwrap.indent(loop, "    ")]
    if rest:
        lines += add(rest, f"({whole} + {{0}})")
    return lines, tables


def c_header(actor: Actor, words: dict[str, str], name: str) -> str:
    """One header, C99 and C++: tables, and a function that skips the zeros."""
    layers, upper = linear_layers(actor), name.upper()
    groups = {layer.m for layer in layers if isinstance(layer, NMLinear)}
    tables = [c_table(f"{name}_{key}", getattr(actor, f"action_{key}")) for key in ("low", "high", "scale", "bias")]
    body = []
    for i, layer in enumerate(layers):
        if i:
            body += [f"for (r = 0; r < {layer.in_features}; r++) y[r] = y[r] < 0.0f ? 0.0f : y[r];"]
            body += ["t = x, x = y, y = t;"]
        lines, more = c_layer(name, i, layer)
        body, tables = body + lines, tables + more
    # a small last group is read as if it were whole
    widest = max(max(layer.in_features, layer.out_features) for layer in layers) + max(groups & SELECTED, default=0)
    words = {
        **words,
        "flash": f"{sum(size for _, size in tables)} bytes of tables, and the code",
        "stack": f"{8 * widest} bytes of arrays",
    }
    head = "\n".join(f" * {key}: {word}" for key, word in words.items())
    return f"""/* A policy of RNM-TD3: observation in, action out.
 *
{head}
 *
 * SPDX-License-Identifier: 0BSD
 */
#ifndef {upper}_H
#define {upper}_H

#include <math.h>

#define {upper}_OBS {layers[0].in_features}
#define {upper}_ACT {layers[-1].out_features}
#ifndef {upper}_API
#define {upper}_API static inline
#endif

{"".join(text for text, _ in tables)}
{"".join(c_pick(name, m) for m in sorted(groups))}
/* NaN in an observation gives NaN in the whole action. */
{upper}_API void {name}_act(const float obs[{upper}_OBS], float action[{upper}_ACT])
{{
    float one[{widest}] = {{0}}, two[{widest}] = {{0}}, *x = one, *y = two, *t;
    const float *v;
    int i, r;
    for (i = 0; i < {upper}_OBS; i++) x[i] = obs[i];
{textwrap.indent(chr(10).join(body), "    ")}

    for (r = 0; r < {upper}_ACT; r++) {{
        const float low = {name}_low[r], high = {name}_high[r];
        const float a = tanhf(y[r]) * {name}_scale[r] + {name}_bias[r];
        action[r] = a < low ? low : a > high ? high : a;
    }}
    for (i = 0; i < {upper}_OBS; i++)
        for (r = 0; isnan(obs[i]) && r < {upper}_ACT; r++) action[r] = obs[i];
}}

#endif
"""


# ---------------------------------------------------------------- ONNX


def onnx_model(actor: Actor, words: dict[str, str]) -> bytes:
    """The dense graph with zeros in place: `observation` [batch, O] to `action` [batch, A]. Raises UsageError.

    Built by hand: `torch.onnx.export` writes paths of this machine into the file.
    """
    try:
        import onnx
    except ImportError as error:
        raise UsageError(f"--format onnx: pip install -r requirements-export.txt ({error})") from error

    def add(operator: str, *constants: torch.Tensor, **attributes: int) -> None:
        output, x = f"{operator}{len(nodes)}", nodes[-1].output[0] if nodes else "observation"
        names = [f"{output}_{i}" for i in range(len(constants))]
        tensors.extend(map(onnx.numpy_helper.from_array, (constant.numpy() for constant in constants), names))
        nodes.append(onnx.helper.make_node(operator, [x, *names], [output], **attributes))

    actor, nodes, tensors = rnm.on_cpu(actor).requires_grad_(False), [], []
    for layer in actor.net:
        add("Gemm", layer.weight, layer.bias, transB=1) if isinstance(layer, nn.Linear) else add("Relu")
    add("Tanh")
    for operator, key in (("Mul", "scale"), ("Add", "bias"), ("Max", "low"), ("Min", "high")):
        add(operator, getattr(actor, f"action_{key}"))
    nodes[-1].output[:] = ["action"]
    sizes = {"observation": actor.net[0].in_features, "action": actor.net[-1].out_features}
    ends = [[onnx.helper.make_tensor_value_info(name, 1, ["batch", size])] for name, size in sizes.items()]
    graph = onnx.helper.make_graph(nodes, "policy", *ends, tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(model, words)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


# ---------------------------------------------------------------- command line


def export(args: Args) -> Path:
    """Write the file, whole or not at all. Raises UsageError, OSError."""
    out = Path(args.out or ("policy.onnx" if args.format == "onnx" else "policy.h"))
    kind = args.format or {".h": "c", ".onnx": "onnx"}.get(out.suffix)
    if kind is None:
        raise UsageError(f"--out {out}: its ending is neither .h nor .onnx; give --format")
    if not re.fullmatch(r"[A-Za-z]\w*", args.name, re.ASCII):
        raise UsageError(f"--name {args.name!r}: give a name for C: a letter, then letters, digits and _")
    if not out.parent.is_dir() or (out.exists() and not out.is_file()) or out.resolve() == Path(args.model).resolve():
        raise UsageError(f"--out {out}: give the path of another file, in a folder that is there")
    actor, words = read_policy(args.model)
    content = c_header(actor, words, args.name).encode() if kind == "c" else onnx_model(actor, words)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    print(f"{out}: {', '.join(words.values())}, {len(content)} bytes")
    return out


def main() -> int:
    """Exit code: 0 done, 1 for a file that could not be written, 2 for bad input."""
    try:
        export(tyro.cli(Args, description=__doc__))
    except (UsageError, td3.UsageError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
