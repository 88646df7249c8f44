"""
The house rules of these files, so that a page of code stays a page: short functions and loops,
narrow lines, imports that run down only. `pytest -s` prints the longest function and loop.
"""
import ast
import graphlib

import pytest

from conftest import ROOT

FLOORS = {                                                 # a module stands on the floors below it
    4: "train_ae train_diffusion evaluate ideas",
    3: "figures latents fid samples theory",
    2: "losses repa data sources weights metrics",
    1: "spectral vae dit runs runtime leaves published",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
FOLDERS = (ROOT, ROOT / "experiments", ROOT / "tests")
LOOPS = ("train_ae.py", "train_diffusion.py")
BLOCKS = (ast.With, ast.For, ast.If, ast.While, ast.Try)


def files(pattern):
    """The project's own files of this kind, in order."""
    return sorted(path for folder in FOLDERS for path in folder.glob(pattern))


def tree(path):
    return ast.parse(path.read_text(), str(path))


def measured(path, node, what):
    """(lines from `def` or `for` to the last one, where it stands)."""
    where = f"{path.relative_to(ROOT)}:{node.lineno} {what}"
    return node.end_lineno - node.lineno + 1, where


def too_long(found, most):
    """Those of [(lines, where)] with more than `most` lines; prints the longest."""
    found = sorted(found, reverse=True)
    print(f"\nthe longest of {len(found)}: {found[0][0]} lines, {found[0][1]}")
    return [entry for entry in found if entry[0] > most]


def depth(node):
    """How many blocks deep the statements inside a node are nested; an `elif` is no deeper."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        elif_ = (isinstance(child, ast.If) and isinstance(node, ast.If)
                 and child in node.orelse and child.col_offset == node.col_offset)
        inside = isinstance(child, BLOCKS) and not elif_
        deepest = max(deepest, inside + depth(child))
    return deepest


def test_no_function_is_longer_than_80_lines():
    """Argument parsers, all named get_args, are lists and may be."""
    functions = []
    for path in files("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name != "get_args":
                functions.append(measured(path, node, node.name))
    assert len(functions) > 300
    assert not too_long(functions, 80)


def test_a_training_loop_has_at_most_60_lines():
    """One `for step` in each training script."""
    loops = []
    for path in (ROOT / name for name in LOOPS):
        steps = [node for node in ast.walk(tree(path)) if isinstance(node, ast.For)
                 and isinstance(node.target, ast.Name) and node.target.id == "step"]
        assert len(steps) == 1, path
        loops.append(measured(path, steps[0], "for step"))
    assert not too_long(loops, 60)


@pytest.mark.parametrize("name", LOOPS)
def test_main_is_nested_at_most_four_levels(name):
    """with, for, if, while and try, counted below `def main`."""
    main, = [node for node in tree(ROOT / name).body
             if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert 1 <= depth(main) <= 4


def wide(path, lines, most):
    """Where those of [(number, line)] that have more than `most` characters stand."""
    return [f"{path.relative_to(ROOT)}:{number} has {len(line)}"
            for number, line in lines if len(line) > most]


def test_code_lines_end_at_column_100():
    """Code, comments, docstrings, tests."""
    found = []
    for path in files("*.py"):
        found += wide(path, enumerate(path.read_text().splitlines(), 1), 100)
    assert not found, "\n".join(found)


def prose(text):
    """(number, line) of a Markdown text but for tables, code fences, links and images."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced and not line.lstrip().startswith("|") \
                and not any(mark in line for mark in ("](", "://", "<img")):
            yield number, line


@pytest.mark.parametrize("path", files("*.md"), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_lines_end_at_column_110(path):
    """Where a line can be broken at all."""
    found = wide(path, prose(path.read_text()), 110)
    assert not found, "\n".join(found)


def imports(path):
    """The project's modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & FLOOR.keys()


def test_imports_run_down_only():
    """
    A module imports modules of lower floors, or of its own without a circle; nobody imports a
    script; spectral.py stands alone, for those who want only the paper's mathematics.
    """
    graph = {path.stem: imports(path) for path in ROOT.glob("*.py")}
    assert graph.keys() == FLOOR.keys()                    # a new module takes a floor
    for module, found in graph.items():
        for other in found:
            assert FLOOR[other] <= min(FLOOR[module], 3), f"{module}.py imports {other}.py"
    graphlib.TopologicalSorter(graph).prepare()            # CycleError names a circle
    assert not graph["spectral"]
    assert sum(map(len, graph.values())) > 20              # the parser sees them
