"""The two scripts share their text, each runs alone, their lengths, and the tools' opinion of all files."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rnm_td3_continuous as rnm
import sad_analysis as sad
import sweep
import td3_continuous as td3

ROOT = Path(__file__).parents[1]
SPARSE, DENSE = ((ROOT / name).read_text() for name in ("rnm_td3_continuous.py", "td3_continuous.py"))
PART_2 = re.compile(r"^# =+ Part 2: the machine room$", re.MULTILINE)
# What the method touches; everything else that both define is the same, word for word.
DIFFERENT = [{"Args", "TD3", "train"}, {"check_args", "MODEL_FORMAT", "CHECKPOINT_FORMAT"}]
DIFFERENT[1] |= {"save_model", "read_model", "load_actor", "on_cpu"}
ADDED = [
    {"nm_mask", "NMLinear", "sparsify"},
    {"CompiledLinear", "NativeLinear", "NMSequential", "NativeActor", "NativeTD3"},
]
ADDED[1] |= {"native_tensors", "dense_layout", "native_mlp", "adam_state"}
ADDED[1] |= {"register_gradients", "load_kernels", "fuse"}
ADDED[1] |= {"CUTLASS", "CUSPARSELT", "SemiStructuredLinear", "SemiStructuredProduct"}
ADDED[1] |= {"try_products"}
ADDED[1] |= {"BACKENDS", "choose_backend", "layer_options", "choose_agent", "SparseRun", "density", "flat_masks"}
FUSED = {"FusedTD3", "product", "one_dnn", "forward", "backward", "step"}  # what the kernels compete with
# Lines at most: Part 1 and the whole of each script, its training loop, what `diff` shows between the two Parts 1.
LENGTHS = {"rnm_td3_continuous.py": (450, 1447), "td3_continuous.py": (300, 938), "loop": 60, "diff": 167}
LENGTHS |= {"nm_kernels.cpp": 700, "README.md": 170, "export_policy.py": 300}


def parts(source):
    """Part 1 and Part 2 of a script."""
    (marker,) = PART_2.finditer(source)
    return source[: marker.start()], source[marker.start() :]


def definitions(source):
    """Text of every class, function and variable, with decorators and later additions to it, by name."""
    texts = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            decorators = [ast.get_source_segment(source, decorator) for decorator in node.decorator_list]
            texts[node.name] = "\n".join([*decorators, ast.get_source_segment(source, node)])
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                texts[name.id] = texts.get(name.id, "") + ast.get_source_segment(source, node)
    return texts


@pytest.mark.parametrize("part", [0, 1])
def test_shared_definitions_are_the_same_text_in_the_same_order(part):
    sparse, dense = (definitions(parts(source)[part]) for source in (SPARSE, DENSE))
    assert set(dense) - set(sparse) == (FUSED if part else set())
    assert set(sparse) - set(dense) == ADDED[part]
    assert {name for name in dense if name in sparse and dense[name] != sparse[name]} == DIFFERENT[part]
    assert [name for name in dense if name in sparse] == [name for name in sparse if name in dense]


def methods(source, name):
    (node,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    functions = [child for child in node.body if isinstance(child, ast.FunctionDef)]
    return {child.name: ast.get_source_segment(source, child) for child in functions}


def test_methods_of_td3_differ_only_by_the_method():
    sparse, dense = (methods(source, "TD3") for source in (SPARSE, DENSE))
    assert {name for name in dense if dense[name] != sparse[name]} == {"__init__", "update_targets"}
    assert set(sparse) - set(dense) == {"project"}


def loop(source):
    """Lines of the training loop."""
    (train,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "train")
    (block,) = (node for node in train.body if isinstance(node, ast.With) and "Run(" in ast.unparse(node.items[0]))
    return source.splitlines()[block.lineno - 1 : block.end_lineno]


def test_lengths():
    for name, source in (("rnm_td3_continuous.py", SPARSE), ("td3_continuous.py", DENSE)):
        first, whole = LENGTHS[name]
        assert len(parts(source)[0].splitlines()) <= first
        assert len(source.splitlines()) <= whole
        assert len(loop(source)) <= LENGTHS["loop"]
    for name in ("nm_kernels.cpp", "README.md", "export_policy.py"):
        assert len((ROOT / name).read_text().splitlines()) <= LENGTHS[name]


def test_what_the_parts_1_differ_by_is_the_method():
    for name, source in (("dense.py", DENSE), ("sparse.py", SPARSE)):
        Path(name).write_text(parts(source)[0])
    diff = subprocess.run(["diff", "dense.py", "sparse.py"], capture_output=True, text=True).stdout
    removed, added = (re.findall(f"^{sign}", diff, re.MULTILINE) for sign in "<>")
    assert len(removed) <= 10 and len(removed) + len(added) <= LENGTHS["diff"]


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


def test_clang_format_is_clean():
    command = [Path(sys.executable).with_name("clang-format"), "--dry-run", "-Werror", ROOT / "nm_kernels.cpp"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_links_of_the_documentation_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / link if link else page
            assert link.startswith("http") or target.exists(), (page.name, link)
            if anchor and not link.startswith("http"):
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                ids = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
                assert anchor in ids, (page.name, link, anchor)
    linked = set(re.findall(r"\]\((docs/[^)#]*)", pages[0].read_text()))
    assert {str(page.relative_to(ROOT)) for page in pages[1:]} <= linked


def test_flags_and_their_defaults_are_as_documented():
    documented = {rnm: ("README.md", "docs/flags.md"), td3: ("docs/flags.md",), sad: ("docs/sad.md",)}
    for script, pages in {**documented, sweep: ("docs/sweeps.md",)}.items():
        shown = {"True": "on", "False": "off", "None": "none", "": "none", script.__name__: "the file's name"}
        found = {}
        for page in pages:
            for names, default in re.findall(
                r"^\| ((?:`--[\w-]+`(?:, )?)+) \| (.*?) \|", (ROOT / page).read_text(), re.M
            ):
                found |= dict.fromkeys(re.findall(r"--([\w-]+)", names), default.strip("`"))
        for name, field in script.Args.__dataclass_fields__.items():
            if name != "runs":  # of the analysis: no flag
                default, text = field.default, found.pop(name.replace("_", "-"))
                words = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
                assert text == shown.get(words, words) or float(text.replace(" ", "")) == default, (script, name)
        assert not found, (script, found)


def test_the_readmes_layer_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if rnm.load_kernels():
        code = code.replace('backend="native"', 'backend="masked"')
    exec(code, names := {})
    assert names["sad"] > 0 and names["linear"].weight.count_nonzero() == 128 * 256
    active = 256 * 5 + 256 * 64 + 6 * 256  # of 17 inputs 1:4 keeps 5
    assert rnm.density(names["network"]) == active / (256 * 17 + 256 * 256 + 6 * 256)
