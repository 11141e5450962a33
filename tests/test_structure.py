"""Who may import whom, read from the source, and what a quick command loads, seen from outside."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rrcli
from comparing import stage_results
from rrcli.files import write_json

PACKAGE = Path(rrcli.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
SERVICES = sorted(path.stem for path in (PACKAGE / "services").glob("*.py") if path.stem != "__init__")
SURFACE = {"cli", "ui", "services", "__main__"}
# The floors of the house: what lies in one imports from lower ones alone. Files of the root stand for themselves.
FLOORS = (
    {"errors", "allocator", "schemas"},
    {"upstream"},
    {"recursion"},
    {"settings", "reporting", "files", "demo", "other_trackers"},
    {"tracker", "configuration", "locks", "plugins"},
    {"data", "models"},
    {"evaluation"},
    {"training", "comparison"},
    {"experiment"},
    {"services"},
    {"ui", "notebook", "lm_eval"},
    {"cli"},
    {"__main__"},
)
# Modules that read and write no tensors: not even a lazy import of torch belongs there.
TORCH_FREE = (
    *("errors", "schemas", "settings", "configuration", "files", "locks", "reporting", "ui", "cli", "allocator"),
    "notebook",
    *(f"data/{name}" for name in ("lines", "problem_files", "prompts", "sources", "readers", "splits", "tasks")),
    *(
        "data/conversations",
        "data/document_store",
        "data/rendering",
        "data/corpus",
        "data/rows",
        "data/hub",
        "data/graders",
    ),
    *("data/final_answers", "data/math_answers", "data/problem_rows", "plugins"),
    *("recursion/batch", "recursion/config"),
    *("models/inspection", "models/manifest", "models/source", "models/export", "models/weights"),
    *("evaluation/distributions", "evaluation/paired", "evaluation/seeds", "experiment/declarations"),
    *("evaluation/stats", "evaluation/metrics", "evaluation/judging", "evaluation/samples"),
    "evaluation/tracing",
    *("experiment/revisions", "experiment/model_card", "experiment/local_servers"),
    *("comparison", "experiment/planning", "experiment/workspace", "experiment/identity"),
)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level: bool = False, at_run_time: bool = False) -> set[str]:
    """Return the absolute names of everything a file imports: `from a import b` gives `a` and `a.b`.

    Args:
        top_level: only what importing the file loads. at_run_time: leave out `if TYPE_CHECKING:`.
    """
    found: set[str] = set()
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]

    def visit(node: ast.AST) -> None:
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if at_run_time and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update({name, *(f"{name}.{alias.name}" for alias in node.names)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def ours(names: set[str]) -> set[str]:
    """Return the parts of the package that are meant: `rrcli.services.eval.evaluate` -> `services`."""
    return {name.split(".")[1] for name in names if name.startswith("rrcli.") and name != "rrcli.__version__"}


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rrcli.errors" in imports(PACKAGE / "cli" / "commands.py")
    file = tmp_path / "a.py"
    file.write_text(
        "import x.y as z\nfrom p import q\nif TYPE_CHECKING:\n    import only_types\n"
        "class C:\n    import inside\n    def f(self):\n        from late import r\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert imports(file) == {"x.y", "p", "p.q", "only_types", "inside", "late", "late.r"}
    assert imports(file, top_level=True, at_run_time=True) == {"x.y", "p", "p.q", "inside"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_typer_belongs_to_cli_and_rich_to_ui(path: Path) -> None:
    used = roots(imports(path))
    assert path.parent.name == "cli" or not used & {"typer", "click"}
    assert path.parent.name == "ui" or "rich" not in used


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nothing_but_the_entry_point_imports_the_command_line(path: Path) -> None:
    assert ids(path) == "__main__.py" or path.parent.name == "cli" or "cli" not in ours(imports(path))


@pytest.mark.parametrize("name", SERVICES)
def test_services_know_neither_each_other_nor_the_screen(name: str) -> None:
    used = imports(PACKAGE / "services" / f"{name}.py")
    assert not {"cli", "ui"} & ours(used)
    others = {part for part in used if part.startswith("rrcli.services")}
    assert not others, f"services/{name}.py imports {sorted(others)}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "services").glob("*.py")), ids=ids)
def test_services_neither_print_nor_exit(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"print", "exit", "quit", "sys.exit", "os._exit"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "recursion").glob("*.py")), ids=ids)
def test_the_recursion_knows_nothing_of_the_tool(path: Path) -> None:
    used = ours(imports(path))
    assert not used & SURFACE
    assert used <= {"recursion", "errors", "upstream"}


def floor(part: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


@pytest.mark.parametrize("path", [path for path in FILES if ids(path) != "__init__.py"], ids=ids)
def test_imports_go_one_way(path: Path) -> None:
    """cli -> ui -> services -> experiment -> training, comparison -> evaluation -> data, models -> tracker -> settings.

    Below `settings` lies the recursion, of which options take their defaults, and below it other people's internals.
    """
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    upwards = {part for part in ours(imports(path, at_run_time=True)) if part != own and floor(part) >= floor(own)}
    assert not upwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even within a package, when they run, or for the sake of a type."""
    modules = {module_of(path): path for path in FILES}
    needs = {name: imports(path) & modules.keys() - {name} for name, path in modules.items()}
    needs.pop("rrcli")  # its names are imported on first use
    while free := {name for name, needed in needs.items() if not needed & needs.keys()}:
        needs = {name: needed for name, needed in needs.items() if name not in free}
    assert not needs, f"in circles, or resting on them: {sorted(needs)}"


def test_a_package_holds_nothing_of_its_own() -> None:
    """So that importing a part of it loads no more than that part. The embedded model alone says where it lies."""
    for path in PACKAGE.glob("*/__init__.py"):
        code = ast.parse(path.read_text(encoding="utf-8")).body[1:]
        assert not code or path.parent.name == "demo", f"{ids(path)} holds code"
    assert imports(PACKAGE / "demo" / "__init__.py") <= {
        *("rrcli.demo.defaults", "rrcli.demo.defaults.MODEL_DIR", "rrcli.demo.defaults.TEXT_FILE")
    }


@pytest.mark.parametrize("name", TORCH_FREE)
def test_a_torch_free_module_never_imports_torch(name: str) -> None:
    place = PACKAGE / name
    for path in place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        assert not roots(imports(path, at_run_time=True)) & {"torch", "transformers", "accelerate", "peft"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "services").glob("*.py")), ids=ids)
def test_services_load_torch_only_when_they_work(path: Path) -> None:
    assert not roots(imports(path, top_level=True)) & {"torch", "transformers", "accelerate", "tensorboard"}


def test_every_command_is_a_service_of_its_name() -> None:
    tree = ast.parse((PACKAGE / "cli" / "commands.py").read_text(encoding="utf-8"))
    commands = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("command(" in ast.unparse(d) for d in node.decorator_list)
    }
    assert commands == set(SERVICES)


# -- what a quick command loads ----------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "accelerate", "tensorboard", "pandas", "pyarrow", "datasets"}
# Runs the command as its entry point does, and writes down at the end which modules were loaded.
WATCH = """
import atexit, json, os, runpy, sys
atexit.register(lambda: open(os.environ["RR_REPORT"], "w").write(json.dumps(list(sys.modules))))
sys.argv[0] = "rr"
runpy.run_module("rrcli", run_name="__main__")
"""


def watched(arguments: list[str], folder: Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a command in a new folder, with results to compare if it compares; return its end and what it loaded."""
    work, report = folder / "work", folder / "report.json"
    work.mkdir()
    if arguments[0] == "compare":
        for stage in ("baseline", "after_surgery"):
            write_json(work / "eval_results" / f"{stage}_results.json", stage_results(stage))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RR_")}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *arguments],
        cwd=work,
        env=environment | {"RR_REPORT": str(report)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    return done, json.loads(report.read_text())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["compare"], 0),
        (["compare", "--json"], 0),
        (["compare", "basline"], 2),
        (["run", "--dry-run"], 0),
        (["eval", "--stage", "basline"], 2),
        (["eval", "--stage", "after_surgery"], 1),
        (["train", "--mode", "foo"], 2),
        (["board"], 1),
        (["status"], 0),
        (["status", "--json"], 0),
        (["compare", "--report", "report.html"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_quick_command_loads_no_torch(tmp_path: Path, arguments: list[str], code: int) -> None:
    done, loaded = watched(arguments, tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert not HEAVY.intersection(loaded)


@pytest.mark.parametrize(("command", "budget"), [("--help", 400), ("compare", 530), ("status", 410)])
def test_a_quick_command_loads_few_modules(tmp_path: Path, command: str, budget: int) -> None:
    """A quick command answers in a fraction of a second because it loads little: that is what the budget guards.

    Most of its time is importing, and one careless import at the top of a file brings hundreds of modules. Their
    number is the same on every machine, however busy, which seconds are not. Budgets are about a tenth above what the
    commands load; raise one only if what a command has to load for its answer has grown. That of `rr compare` holds
    numpy, which flips signs.
    """
    done, loaded = watched([command], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(loaded) <= budget


def test_importing_the_package_loads_next_to_nothing() -> None:
    code = "import sys, rrcli; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'rich')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_listed_and_typos_refused() -> None:
    assert set(rrcli.__all__) <= set(dir(rrcli))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = rrcli.atach
