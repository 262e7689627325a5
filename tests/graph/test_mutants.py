"""Every restriction in the rules is needed: leave one out, and some network or family is transformed wrongly.

Mutants are generated: each call that pins, restricts, joins or notes a use is dropped, and each group is widened.
"""

import ast
import contextlib
import importlib
import inspect
import pkgutil
from types import CodeType

import pytest
from helpers.rule_cases import BODIES, case, check_body
from helpers.sites import check_site, rows
from helpers.soundness import CONFIGS, describe, family

from quantize.graph import rules as package
from quantize.graph.analysis import admissible_bases, find_bases

pytestmark = pytest.mark.slow

DROPPED = {"pin", "pin_all", "pin_derived", "restrict", "use", "append", "mean_square", "pair", "gain", "join"}
NAMES = [found.name for found in pkgutil.iter_modules(package.__path__) if found.name != "table"]  # which has no rule
MODULES = [importlib.import_module(f"{package.__name__}.{name}") for name in NAMES]


def called(node):
    """The name of what a statement calls, if it does nothing else."""
    call = getattr(node, "value", None)
    if not isinstance(node, ast.Expr | ast.Return) or not isinstance(call, ast.Call):
        return ""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def sites(tree):
    """All places to mutate in the bodies of functions, in order."""
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for node in (node for statement in function.body for node in ast.walk(statement)):
            is_group = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "AllowedTransforms"
            if called(node) in DROPPED or (is_group and node.attr != "LINEAR"):
                yield node


def mutated(module, number):
    """The module's code with one site changed."""
    tree = ast.parse(inspect.getsource(module))
    node = list(sites(tree))[number]
    if isinstance(node, ast.Attribute):
        node.attr = "LINEAR"
    else:
        node.value = ast.copy_location(ast.Constant(None), node)
    return compile(tree, module.__file__, "exec")


def functions(code, found):
    """Code objects of a module's functions by name."""
    found |= {const.co_name: const for const in code.co_consts if isinstance(const, CodeType)}
    return found


@contextlib.contextmanager
def mutant(module, number):
    """Run with a mutated module; tables and imports keep their functions, whose code is swapped."""
    new, old = functions(mutated(module, number), {}), {}
    for name, function in vars(module).items():
        if inspect.isfunction(function) and function.__module__ == module.__name__ and name in new:
            old[function], function.__code__ = function.__code__, new[name]
    try:
        yield
    finally:
        for function, code in old.items():
            function.__code__ = code


def name_of(module, node):
    text = ast.unparse(node)
    return f"{module.__name__.rsplit('.', 1)[-1]}:{node.lineno} {text if len(text) < 60 else text[:60] + '…'}"


MUTANTS = [
    pytest.param(module, number, id=name_of(module, node))
    for module in MODULES
    for number, node in enumerate(sites(ast.parse(inspect.getsource(module))))
]


def is_caught():
    """Whether a test of the rules, or of a family, fails."""
    try:
        for name in BODIES:
            if found(case(name).program) != ORIGINAL["body", name]:
                check_body(name)
        for name in CONFIGS:
            if found(family(name).program) != ORIGINAL["family", name]:
                bases = admissible_bases(family(name).program)
                for row in (row for row in rows() if row[0] == name):
                    check_site(row, bases)
    except Exception:
        return True
    return False


def found(program):
    """All the analysis says, so that only networks that a mutant changes are tried."""
    bases = find_bases(program).all
    return [(describe(b), [(e.index.tolist(), e.region) for e in (*b.writers, *b.readers)]) for b in bases]


ORIGINAL = {}


@pytest.fixture(scope="module", autouse=True)
def _original():
    ORIGINAL.update({("body", name): found(case(name).program) for name in BODIES})
    ORIGINAL.update({("family", name): found(family(name).program) for name in CONFIGS})


def test_there_are_many_mutants():
    assert len(MUTANTS) > 50


@pytest.mark.parametrize(("module", "number"), MUTANTS)
def test_a_mutant_is_caught(module, number):
    with mutant(module, number):
        assert is_caught()
