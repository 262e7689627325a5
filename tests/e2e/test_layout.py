"""The architecture, as far as a file listing can hold it."""

import ast
import json
import re
import tomllib
from pathlib import Path

from helpers.soundness import CONFIGS

import quantize
from quantize.checkpoint.meta_model import build_skeleton

ROOT = Path(__file__).parents[2]
SOURCES = [p for d in ("quantize", "calibration", "kernels", "eval") for p in sorted((ROOT / d).rglob("*.py"))]


FOREIGN = {
    "genai.py",
    "targets.py",
    "architectures.py",
    "gguf_tokenizer.py",
}  # which have names of other tools, or write their lists
OPERATORS = {"layer_norm"}  # a module is called like the operator


def names_of_families():
    """Class names, and names of modules and parameters that are no plain English word, of all families."""
    names = set()
    for name in CONFIGS:
        model = build_skeleton(json.loads(CONFIGS[name].read_text()))
        names |= {type(module).__name__ for module in model.modules() if type(module).__module__.startswith("transf")}
        names |= {
            part
            for path, _ in model.named_parameters()
            for part in path.split(".")
            if re.search(r"\w_\w|[a-z]\d", part)
        }
    return {name for name in names if not name.isdigit()} - OPERATORS


def test_no_model_is_known_by_name():
    families = rf"(?i:(?<![a-z0-9])({'|'.join(CONFIGS)})(?![a-z]|\.cpp|-cli))"  # llama.cpp is a tool
    names = re.compile(rf"{families}|\b({'|'.join(sorted(names_of_families()))})\b")
    for path in (p for p in SOURCES if "eval" not in p.parts and p.name not in FOREIGN):
        code = "\n".join(ast.unparse(node) for node in ast.parse(path.read_text()).body if not is_docstring(node))
        found = [line for line in code.splitlines() if names.search(line) and '"""' not in line]
        assert not found, (path, found)


def test_the_names_are_those_that_matter():
    assert {"q_proj", "c_attn", "query_key_value", "fc1", "lm_head", "LlamaMLP", "gate_up_proj"} <= names_of_families()


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_no_pickle():
    for path in SOURCES:
        wrong = r"\bpickle\b|torch\.save\(|torch\.load\((?!.*weights_only=True)|trust_remote_code=True"
        assert not re.search(wrong, path.read_text()), path


def test_every_folder_with_code_or_data_is_packaged():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {p.parent.relative_to(ROOT) for p in [*SOURCES, *(ROOT / "recipes").glob("*.toml")]}
    assert packages == {
        ".".join(("quantize", *folder.parts)).replace("quantize.quantize", "quantize") for folder in folders
    }


def test_the_package_is_read_in_one_look():
    """What a newcomer finds in `quantize/`; the folders beside it are links."""
    entries = [p.name for p in (ROOT / "quantize").iterdir() if not p.is_symlink() and not p.name.startswith("__")]
    assert len(entries) <= 16, sorted(entries)


def test_no_folder_hides_a_public_function():
    """Importing `quantize.x` sets the attribute `x` of the package, whatever stood there."""
    assert not {p.stem for p in (ROOT / "quantize").iterdir()} & set(quantize.__all__)


def imported(path):
    """Full names of all that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {".".join(filter(None, (getattr(node, "module", None), alias.name))) for alias in node.names}
    return names


def test_no_test_file_imports_another():
    """What two test files share lies in tests/helpers/."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 50
    for path in files:
        named = {name for name in imported(path) if re.search(r"(^|\.)(test_\w+|conftest)(\.|$)", name)}
        assert not named, (path, named)
