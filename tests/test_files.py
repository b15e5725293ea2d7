"""The two scripts share their text, each runs alone, and the tools' opinion of all files."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPARSE, DENSE = ((ROOT / name).read_text() for name in ("rnm_td3_continuous.py", "td3_continuous.py"))
# What the method touches; everything else that both define is the same, word for word.
DIFFERENT = {"Args", "check_args", "save_model", "load_actor", "polyak_update", "TD3", "Actor", "train", "MODEL_FORMAT"}
ADDED = {"nm_mask", "NMLinear", "sparsify", "density", "save_masks"}
ADDED |= {"packed_masks", "KERNELS", "load_kernels", "choose_backend", "NMSequential", "NativeTD3"}
ADDED |= {"native_tensors", "native_mlp", "native_polyak", "native_project", "native_adam"}
ADDED |= {"semi_structured_pad", "semi_structured_weight", "SemiStructuredProduct"}
ONE_DNN = {"FusedMLP", "FusedSequential", "one_dnn_is_faster"}  # the dense products that the kernels compete with


def definitions(source):
    nodes = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            nodes[node.name] = node
        elif isinstance(node, ast.Assign):
            nodes[node.targets[0].id] = node
    return {name: ast.get_source_segment(source, node) for name, node in nodes.items()}


def test_shared_definitions_are_the_same_text():
    sparse, dense = definitions(SPARSE), definitions(DENSE)
    assert set(dense) - set(sparse) == ONE_DNN
    assert {name for name in dense if name in sparse and dense[name] != sparse[name]} == DIFFERENT
    assert set(sparse) - set(dense) == ADDED


def test_methods_of_td3_differ_only_by_the_method():
    methods = []
    for source in (SPARSE, DENSE):
        (td3,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "TD3")
        functions = [node for node in td3.body if isinstance(node, ast.FunctionDef)]
        methods.append({node.name: ast.get_source_segment(source, node) for node in functions})
    sparse, dense = methods
    assert {name for name in dense if dense[name] != sparse[name]} == {"__init__"}
    assert set(sparse) - set(dense) == {"project", "project_layers"}


def test_the_sparse_script_adds_and_changes_little():
    """In the dense script's order, all but a few of its lines stand in the sparse one: its products apart."""
    dense = definitions(DENSE)
    Path("dense.py").write_text(functools.reduce(lambda text, name: text.replace(dense[name], ""), ONE_DNN, DENSE))
    diff = subprocess.run(["diff", "-B", "dense.py", ROOT / "rnm_td3_continuous.py"], capture_output=True, text=True)
    assert len(re.findall("^<", diff.stdout, re.MULTILINE)) <= 20


def test_length():
    python = re.sub(r'^KERNELS = r""".*?^"""$', "", SPARSE, flags=re.MULTILINE | re.DOTALL)
    # of these, checkpoints, resume and what guards them are 560 in each
    assert len(SPARSE.splitlines()) < 2210 and len(python.splitlines()) < 1640 and len(DENSE.splitlines()) < 1200


@pytest.mark.parametrize("source", [SPARSE, DENSE])
def test_inline_metadata_equals_requirements(source):
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.MULTILINE).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    end = "# to plot" if source is SPARSE else "# to compile"
    requirements = (ROOT / "requirements.txt").read_text().split(end)[0]
    assert metadata["dependencies"] == [line for line in requirements.splitlines() if not line.startswith("#")]
    assert metadata["requires-python"] == ">=3.11"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_clean(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
