"""How many small errors the tests find: `mutants.py [--each N] [--seed S] [--file FILE.csv] [MODULE ...]`.

One thing at a time is changed in a module: a comparison, a constant, an operator, a condition, or the order of two
arguments. The tests that call the changed function run on it, the cheapest first, in a process of their own with a
limit of CPU time; the tests of DEAR are left out. A mutant that no test notices survives, and is shown. From every
module a fixed draw of mutants is tried; another seed draws others. Sites that cannot matter are left out:
documentation, annotations, texts, how a figure looks, and those of EQUIVALENT, each with its reason.
"""
import argparse
import ast
import copy
import functools
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "comparison": ["test_comparison.py"],
    "claims": ["test_claims.py"],
    "metrics": ["test_measures.py"],
    "agreement": ["test_measures.py"],
    "correlation": ["test_measures.py"],
    "layers": ["test_layers.py", "test_measures.py"],
    "magnitude": ["test_magnitude.py"],
    "variational": ["test_variational.py"],
    "zoos": ["test_tables.py", "test_population.py"],
}  # module -> tests, in the order in which they run
DEAR = (
    "deliberate_error_shows", "several_zoos_are_matched", "what_was_not_run", "what_was_fitted",
        "distinct_states_of_all",
    "a_shifted_zoo", "a_shift_turns", "real_grid", "every_zoo_gets", "incomplete_runs", "models_without_spread",
    "lower_bound_of", "definition_behind", "intervals_hold", "errors_of_pooled",
)  # tests of seconds: mutants are to be found without them
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
    "blend_palette(": "how a figure looks",
    "1e-6": "dust of floating point",
    "z['ours_mean'] - sign * half": "both signs are taken",
    "printed_models(9": "as many models as in Table 8",
    "key = lambda level:": "a key that both sides form alike",
    "len(zoo.activation) > 1": "zoos have one activation or four",
    "round(12)": "dust of floating point",
    "300  ->  301": "how many resamples, not of what",
    "400  ->  401": "how many resamples, not of what",
    "seed: int = 0": "another seed is as good",
    "< set(both)": "the frame holds the originals too, so that it is never the two methods alone",
    "r(b.mean(axis=0), a.mean(axis=0))": "a correlation is symmetric",
    "sys.argv": "how the module is called",
    "->  rows_of_states(choose_states(rows), rows)": "two frames are joined either way",
    "->  r(vd, before)": "a correlation is symmetric",
    "->  r(mp, before)": "a correlation is symmetric",
    "->  correlate(both['mp'], both['before'])": "a correlation is symmetric",
    "->  correlate(pairs['after'], pairs['before']": "a correlation is symmetric",
    "->  correlate(rows['after'], rows['before']": "a correlation is symmetric",
    '["permille"] =': "a key that both sides form alike",
    "resamples=1)": "an interval that nobody reads",
    "where=untied > 0": "pairs count twice, so that it is 0 or at least 4",
    'rows["level"].round(': "levels are whole permilles",
    "v.std() or": "a constant becomes zero either way",
    "len(values) >= 1": "a factor with one level gives no column either way",
}  # part of a line, or of what became of it -> why a change there need not be found
COMMUTATIVE = {
    "max", "min", "isclose", "allclose", "hypot", "maximum", "minimum", "corrcoef", "pearsonr", "kendalltau",
    "exact", "resampled", "pearson_of_resamples", "kendall_of_resamples",  # names of correlation coefficients
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
        new = changed(node)
        what = f"{ast.unparse(node)[:70]}  ->  {ast.unparse(new)[:70]}"
        if any(part in lines[node.lineno - 1] or part in what for part in EQUIVALENT):
            continue
        container, key = (getattr(parent, field), place) if place is not None else (parent.__dict__, field)
        container[key] = ast.copy_location(new, node)
        text = ast.unparse(ast.fix_missing_locations(tree))
        container[key] = node
        yield node.lineno, what, text


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


def functions(source: str) -> list[tuple[str, int, int]]:
    "Name, first and last line of functions and methods, but not of those within one."
    within = [(node, f"{top.name}." if isinstance(top, ast.ClassDef) else "") for top in ast.parse(source).body
              for node in (top.body if isinstance(top, ast.ClassDef) else [top])]
    return [(prefix + node.name, node.lineno, node.end_lineno) for node, prefix in within
            if isinstance(node, ast.FunctionDef) and not node.decorator_list]


def function_of(line: int, source: str) -> str:
    "The function to which a line belongs; empty outside of functions."
    return next((name for name, first, last in functions(source) if first <= line <= last), "")


def found_in(namespace: dict, name: str) -> FunctionType:
    "A function or method of a module by its name."
    first, *rest = name.split(".")
    return functools.reduce(getattr, rest, namespace[first])


def replace(module: str, names: list[str], text: str) -> None:
    "Give functions of an imported module the code and the defaults that they have in another source."
    path = str(ROOT / "zootwins" / f"{module}.py")
    other = {"__name__": "zootwins._other", "__package__": "zootwins", "__file__": path}
    sys.modules["zootwins._other"] = ModuleType("zootwins._other")  # dataclasses look their module up
    exec(compile(text, path, "exec"), other)
    for name in names:
        old, new = found_in(vars(sys.modules[f"zootwins.{module}"]), name), found_in(other, name)
        if old.__code__.co_freevars == new.__code__.co_freevars:
            old.__code__ = new.__code__
        old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__


def watched(source: str) -> str:
    "The source, in which every function says first that it is called."
    tree, lines = ast.parse(source), {first for _, first, _ in functions(source)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.lineno in lines:
            node.body.insert(0, ast.parse(f"__import__('sys').called.add({node.lineno})").body[0])
    return ast.unparse(ast.fix_missing_locations(tree))


class Watch:
    "A plugin of pytest: which functions each test calls, itself or by its fixtures, and what it costs."

    def __init__(self):
        self.fixtures, self.tests, sys.called = {}, {}, set()

    @contextmanager
    def watching(self):
        outer, sys.called, start, found = sys.called, set(), time.process_time(), []
        yield found
        found += [sys.called, time.process_time() - start]
        sys.called = outer | sys.called

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        with self.watching() as found:
            yield
        self.fixtures[fixturedef] = found

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        with self.watching() as found:
            yield
        known = [self.fixtures.get(of[-1]) for of in item._fixtureinfo.name2fixturedefs.values()]
        called, seconds = zip(found, *filter(None, known))
        self.tests[item.nodeid] = sum(seconds), sorted(set().union(*called))


def stop(problem: str) -> None:
    "End with a sentence on the terminal."
    print(problem, file=sys.__stdout__, flush=True)
    os._exit(1)


class Try:
    "A plugin of pytest that, once the tests are collected, runs those concerned on one mutant after the other."

    def __init__(self, module: str, drawn: list[tuple[int, str, str]], workers: int):
        self.module, self.drawn, self.workers = module, drawn, workers
        self.source = (ROOT / "zootwins" / f"{module}.py").read_text(encoding="utf-8")
        self.running, self.survived, self.inside = {}, [], False

    def wait(self):
        "Wait for one child."
        child, status = os.wait()
        line, what, _ = self.running.pop(child)
        if status == 0:
            self.survived.append(line)
            print(f"  survived: zootwins/{self.module}.py:{line}  {what}", file=sys.__stdout__, flush=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if self.inside:
            return None
        kept = Path(tempfile.mkdtemp()) / "tests"
        if not (child := os.fork()):
            return self.watch(session, kept)
        if os.waitpid(child, 0)[1]:
            stop(f"The tests of {self.module} do not pass as they are: {', '.join(TESTS[self.module])}; "
                     "mutants say nothing before they do.")
        tests = json.loads(kept.read_text(encoding="utf-8"))
        cheap = dict(sorted(tests.items(), key=lambda test: test[1][0])[:5])
        for line in (functions(self.source)[0][1], 0):
            if not (child := os.fork()):
                return self.try_one(session, (line, "", self.source), cheap)
            if os.waitpid(child, 0)[1]:
                stop(f"The tests of {self.module} fail on a mutant in which nothing was changed.")
        for mutant in self.drawn:
            if len(self.running) == self.workers:
                self.wait()
            if not (child := os.fork()):
                return self.try_one(session, mutant, tests)
            self.running[child] = mutant
        while self.running:
            self.wait()
        return True

    def watch(self, session, kept: Path):
        "In the child: run all tests and keep what they call."
        self.inside, plugin = True, Watch()
        replace(self.module, [name for name, _, _ in functions(self.source)], watched(self.source))
        session.config.pluginmanager.register(plugin)
        session.config.add_cleanup(lambda: kept.write_text(json.dumps(plugin.tests), encoding="utf-8"))

    def try_one(self, session, mutant: tuple[int, str, str], tests: dict):
        "In the child: run the tests that call the changed function, the cheapest first; all if it is in none."
        line, _, text = mutant
        name = function_of(line, self.source)
        first, last = next(((a, b) for of, a, b in functions(self.source) if of == name), (0, 0))
        cost = lambda test: tests[test][0]
        chosen = sorted((test for test, (_, called) in tests.items()
                         if not name or any(first <= place <= last for place in called)), key=cost)
        limit = int(10 + 5 * sum(map(cost, chosen)))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        self.inside = True
        if not chosen:
            os._exit(0)
        if name:
            replace(self.module, [name], text)
            by_name = {item.nodeid: item for item in session.items}
            session.items[:] = [by_name[test] for test in chosen]
            return None
        for loaded in [of for of in sys.modules if of.split(".")[0] in ("zootwins", "conftest", "small",
            *self.files())]:
            del sys.modules[loaded]
        sys.meta_path.insert(0, Changed(f"zootwins.{self.module}", text))
        os._exit(int(pytest.main(options(self.module), plugins=[Only(chosen)])))

    def files(self) -> list[str]:
        return [name.removesuffix(".py") for name in TESTS[self.module]]


class Only:
    "A plugin of pytest: these tests, in this order."

    def __init__(self, tests: list[str]):
        self.tests = tests

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((of for of in items if of.nodeid in self.tests), key=lambda of: self.tests.index(of.nodeid))


def options(module: str) -> list[str]:
    "What pytest is called with."
    files = [str(ROOT / "tests" / name) for name in TESTS[module]]
    return ["-x", "-q", "-s", "-p", "no:cacheprovider", "-k", f"not ({' or '.join(DEAR)})", *files]


def score(module: str, each: int, seed: int, workers: int, result: Path) -> None:
    "Try mutants of a module and show those that survive; write how many were found, tried, and possible."
    every = list(mutants((ROOT / "zootwins" / f"{module}.py").read_text(encoding="utf-8")))
    plugin = Try(module, random.Random(seed).sample(every, min(each, len(every))), workers)
    silence = os.open(os.devnull, os.O_WRONLY)
    sys.__stdout__ = os.fdopen(os.dup(1), "w")
    os.dup2(silence, 1), os.dup2(silence, 2)
    code = pytest.main(options(module), plugins=[plugin])
    if not plugin.inside:
        result.write_text(json.dumps([len(plugin.drawn) - len(plugin.survived), len(plugin.drawn), len(every)]))
    os._exit(int(code))


def main():
    "Try mutants, show the survivors, and print the score of every module."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--each", type=int, default=40, help="mutants a module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--file", type=Path, help="a CSV to which the scores are added, module by module")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HYPOTHESIS_STORAGE_DIRECTORY": tempfile.mkdtemp()}
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT))
    import hypothesis, matplotlib.pyplot, pyarrow.parquet  # noqa: E401, F401  (inherited by every child)
    import scipy.stats, seaborn, torch  # noqa: E401, F401

    lines, found, result = [f"{'module':14}{'found':>7}{'tried':>7}{'sites':>7}{'score':>8}{'s':>7}"], {}, None
    for module in asked.modules:
        start, result = time.time(), Path(tempfile.mkdtemp()) / "score"
        if not (child := os.fork()):
            score(module, asked.each, asked.seed, asked.workers, result)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"The mutants of {module} could not be tried.")
        killed, tried, every = found[module] = json.loads(result.read_text())
        lines.append(f"{module:14}{killed:7}{tried:7}{every:7}{killed / tried:8.1%}{time.time() - start:7.0f}")
        print(lines[-1], flush=True)
        if asked.file:
            heading = "" if asked.file.exists() else "module,seed,found,tried,sites\n"
            with asked.file.open("a", encoding="utf-8") as file:
                file.write(f"{heading}{module},{asked.seed},{killed},{tried},{every}\n")
    killed, tried, every = (sum(counts) for counts in zip(*found.values()))
    print("\n".join(["", *lines, f"{'all':14}{killed:7}{tried:7}{every:7}{killed / tried:8.1%}"]))
    sys.exit(any(killed < 0.95 * tried for killed, tried, _ in found.values()))


if __name__ == "__main__":
    main()
