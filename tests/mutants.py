"""How many small errors the tests find: `mutants.py [--each N] [--seed S] [MODULE ...]`.

One thing at a time is changed in a module: a comparison, a constant, an operator, a condition, or the order of two
arguments. The tests of the module run on it, in a process of its own with a limit of CPU time. A mutant that no test
notices survives, and is shown. From every module a fixed draw of mutants is tried; another seed draws others. Sites
that cannot matter are left out: documentation, annotations, texts, how a figure looks, and the lines of EQUIVALENT,
each with its reason.
"""
import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "comparison": ["test_comparison.py", "test_evidence.py"],
    "claims": ["test_claims.py", "test_evidence.py"],
    "metrics": ["test_measures.py"],
    "agreement": ["test_measures.py"],
    "correlation": ["test_measures.py"],
    "layers": ["test_layers.py", "test_measures.py"],
    "magnitude": ["test_magnitude.py"],
    "variational": ["test_variational.py"],
    "zoos": ["test_tables.py", "test_population.py"],
}  # module -> tests, in the order in which they run
CPU_SECONDS = 180
EQUIVALENT = {
    "figsize=": "how a figure looks",
    "fontsize=": "how a figure looks",
    ".set(": "how a figure looks",
    "ax.": "how a figure looks",
    "axes": "how a figure looks",
    "fig.": "how a figure looks",
    "memory": "how much is done at a time, not what",
    "1e-9": "dust of floating point",
    "1e-15": "dust of floating point",
    "1e-12": "dust of floating point",
    "default_rng(": "another seed is as good",
    "resamples: int": "how many resamples, not of what",
    "n_classes = int(": "one class more is never predicted",
    "pairwise_agreement(twins, originals)": "the same pairs, the other way round",
    "__name__": "how the module is called",
    "_drawn(": "how a figure looks",
    ".clip(-0.9999, 0.9999)": "where a transform is cut",
}  # part of a line -> why a change there need not be found
COMMUTATIVE = {
    "max", "min", "isclose", "allclose", "hypot", "maximum", "minimum", "corrcoef", "pearsonr", "kendalltau",
}  # the order of their arguments does not matter
OPERATORS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


def changed(node: ast.AST) -> ast.AST | None:
    "The node with one small error; none where there is nothing to change."
    new = copy.deepcopy(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        new.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        new.value = node.value + 1 if isinstance(node.value, int) else 2 * node.value or 0.5
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        new.ops[0] = OPERATORS[type(node.ops[0])]()
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPERATORS:
        new.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        new = new.operand
    elif isinstance(node, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in COMMUTATIVE:
        return None
    elif (
        isinstance(node, ast.Call)
        and len(node.args) > 1
        and not any(isinstance(a, ast.Starred) for a in node.args[:2])
        and ast.dump(node.args[0]) != ast.dump(node.args[1])
    ):
        new.args[:2] = new.args[1::-1]
    else:
        return None
    return new


def sites(
    node: ast.AST, parent: ast.AST | None = None, field: str = "", place: int | None = None
) -> Iterator[tuple[ast.AST, ast.AST, str, int | None]]:
    "Nodes that can be changed, each with its parent and its place there; annotations and texts are passed over."
    if isinstance(node, ast.FunctionDef) and (
        node.name.startswith(("figure_", "draw_")) or node.name in ("__repr__", "_repr_html_")
    ):
        return
    if isinstance(node, (ast.JoinedStr, ast.Raise, ast.alias)):
        return
    if parent is not None and changed(node) is not None:
        yield node, parent, field, place
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield from sites(child, node, name, i)


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    "Line, what it became, and the whole changed source."
    tree, lines = ast.parse(source), source.split("\n")
    for node, parent, field, place in list(sites(tree)):
        if any(part in lines[node.lineno - 1] for part in EQUIVALENT):
            continue
        new = changed(node)
        container, key = (getattr(parent, field), place) if place is not None else (parent.__dict__, field)
        container[key] = ast.copy_location(new, node)
        text = ast.unparse(ast.fix_missing_locations(tree))
        container[key] = node
        yield node.lineno, f"{ast.unparse(node)[:70]}  ->  {ast.unparse(new)[:70]}", text


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Imports one module from a changed source."

    def __init__(self, name: str, source: str):
        self.name, self.source = name, source

    def find_spec(self, name, path=None, target=None):
        return (
            importlib.util.spec_from_loader(name, self, origin=str(ROOT / f"{name.replace('.', '/')}.py"))
            if name == self.name
            else None
        )

    def exec_module(self, module):
        module.__file__ = str(ROOT / f"{self.name.replace('.', '/')}.py")
        exec(compile(self.source, module.__file__, "exec"), module.__dict__)


def passes(module: str, source: str) -> bool:
    "Run a module's tests on a source, in a forked process with the libraries already there."
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1), os.dup2(silence, 2)
        sys.meta_path.insert(0, Changed(f"zootwins.{module}", source))
        import pytest

        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", *(str(ROOT / "tests" / name) for name in TESTS[module])]
        )
        os._exit(int(code))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main():
    "Try mutants, show the survivors, and print the score of every module."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--each", type=int, default=40, help="mutants a module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HYPOTHESIS_STORAGE_DIRECTORY": tempfile.mkdtemp()}
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT))
    import hypothesis, matplotlib.pyplot, pyarrow.parquet  # noqa: E401, F401  (inherited by every child)
    import pytest, scipy.stats, seaborn, torch  # noqa: E401, F401

    found = {}
    with ThreadPoolExecutor(options.workers) as workers:
        for module in options.modules:
            source, start = (ROOT / "zootwins" / f"{module}.py").read_text(encoding="utf-8"), time.time()
            if not passes(module, source):
                sys.exit(
                    f"The tests of {module} do not pass as they are: {', '.join(TESTS[module])}; "
                    "mutants say nothing before they do."
                )
            every = list(mutants(source))
            drawn = random.Random(options.seed).sample(every, min(options.each, len(every)))
            alive = workers.map(passes, [module] * len(drawn), [text for _, _, text in drawn])
            survived = [mutant for mutant, lives in zip(drawn, alive) if lives]
            for line, what, _ in sorted(survived):
                print(f"  survived: zootwins/{module}.py:{line}  {what}", flush=True)
            found[module] = (len(drawn) - len(survived), len(drawn))
            print(
                f"{module}: {found[module][0]} of {found[module][1]} found, "
                f"drawn from {len(every)}, {time.time() - start:.0f} s",
                flush=True,
            )
    killed, tried = (sum(counts) for counts in zip(*found.values()))
    print(f"all: {killed} of {tried} found, {killed / tried:.1%}")
    sys.exit(killed < 0.95 * tried)


if __name__ == "__main__":
    main()
