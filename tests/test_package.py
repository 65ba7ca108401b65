"""The package as a whole: layout, import order, import cost, packaging, and what must not be in the repository."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest

import instructgym

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("llm_backends", "rewards", "envs", "agents", "experiments")  # each may import itself and those before it
FILES = sorted([*ROOT.glob("*.py"), *(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))])


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """All modules that a file names, with line numbers: imports at any depth, and names resolved at run time.

    A string such as "instructgym.agents.sb3.baselines:Random" counts, because a registry that holds it will import it.
    """
    package = ("instructgym", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*anchor, *(node.module or "").split(".")) if node.module else anchor)
            # `from .. import agents` names the module in the alias, not in the path.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"instructgym(\.\w+)+(:\w+)?", str(node.value)):
            yield node.lineno, str(node.value).replace(":", ".")


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "instructgym" and len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    offences = [
        f"{path.relative_to(ROOT)}:{line} names {module}"
        for path in (ROOT / layer).rglob("*.py")
        for line, module in imported_modules(path)
        if layer_of(module) not in (None, *allowed)
    ]
    assert not offences, f"{layer} may import only {', '.join(allowed)}:\n" + "\n".join(offences)


@pytest.mark.parametrize(
    "statement",
    [
        "from ..agents import baselines",
        "from ..agents.baselines import Random",
        "from .. import agents",
        "import instructgym.agents.sb3.baselines",
        "def late():\n    from instructgym import agents",
        "AGENTS = {'random': 'instructgym.agents.sb3.baselines:Random'}",
    ],
)
def test_the_import_scan_sees_every_form(statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "envs" / "sample.py"
    file.parent.mkdir()
    file.write_text(statement, encoding="utf-8")
    assert "agents" in [layer_of(module) for _, module in imported_modules(file)]


THIRD_PARTY = {  # what peft, transformers and torch keep under such names, with the reason beside each use
    "_active_adapter",
    "_can_set_attn_implementation",
    "_disable_adapters",
    "_is_amx_tile_supported",
    "_is_avx512_bf16_supported",
}


def test_nothing_reaches_into_the_underscored_names_of_another_file() -> None:
    offences = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = set(THIRD_PARTY)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                offences += [f"{path.relative_to(ROOT)}: {a.name}" for a in node.names if a.name.startswith("_")]
            elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and node.attr not in own:
                of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if not of_self and not ast.unparse(node.value).startswith("super("):
                    offences.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not offences, "\n".join(offences)


def faces() -> dict[str, str]:
    """What the lazy faces of layers hand on: "instructgym.rewards.EqualityJudge" to the module that defines it."""
    names = {}
    for stub in ROOT.glob("*/__init__.pyi"):
        layer = f"instructgym.{stub.parent.name}"
        for node in ast.parse(stub.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                names |= {f"{layer}.{alias.name}": f"{layer}.{node.module}" for alias in node.names}
    return names


def imported_files(path: Path, handed_on: dict[str, str]) -> set[str]:
    """The package's files that a file imports, at any depth, as paths from the root."""
    files = set()
    for _, module in imported_modules(path):
        package, *parts = handed_on.get(module, module).split(".")
        if package != "instructgym":
            continue
        for candidate in (parts, parts[:-1]):  # the last part may be a name in a module
            base = ROOT.joinpath(*candidate)
            if candidate and base.with_suffix(".py").is_file():
                files.add(str(base.with_suffix(".py").relative_to(ROOT)))
                break
    return files


def test_no_circle_of_imports() -> None:
    files, handed_on = [path for path in FILES if path.name != "__init__.py"], faces()
    graph = {str(path.relative_to(ROOT)): imported_files(path, handed_on) for path in files}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these files import each other in a circle, or import one that does: {sorted(graph)}"


def test_rooms_are_small_and_say_what_they_hold() -> None:
    folders = {path.parent for path in FILES if path.parent != ROOT}
    crowded = {str(f.relative_to(ROOT)): n for f in folders if (n := len(list(f.glob("*.py")))) > 14}
    assert not crowded, f"more than 14 files in one folder: {crowded}"
    assert not [path for path in FILES if path.stem == path.parent.name], "a file repeats its folder's name"
    bare = [
        str(f.relative_to(ROOT)) for f in folders if not ast.get_docstring(ast.parse((f / "__init__.py").read_text()))
    ]
    assert not bare, f"no docstring says what these folders hold: {bare}"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_brings_no_heavy_library() -> None:
    heavy = (
        "torch",
        "transformers",
        "stable_baselines3",
        "sb3_contrib",
        "sentence_transformers",
        "wandb",
        "matplotlib",
    )
    code = f"import sys, instructgym; print(*[name for name in {heavy} if name in sys.modules])"
    assert run_python(code) == ""


def test_import_brings_little_above_gymnasium() -> None:
    code = "import sys, gymnasium; before = set(sys.modules); import instructgym; print(*set(sys.modules) - before)"
    brought = run_python(code).split()
    assert {name.split(".")[0] for name in brought} - set(sys.stdlib_module_names) == {"instructgym", "lazy_loader"}
    own = {name for name in brought if name.startswith("instructgym.")}
    assert own <= {
        "instructgym.envs",
        "instructgym.envs.registration",
        "instructgym.llm_backends",
        "instructgym.llm_backends.errors",
        "instructgym.llm_backends.parts",
        "instructgym.rewards",
    }


def test_files_stay_readable_in_one_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert lengths["__init__.py"] < 40
    assert {name: length for name, length in lengths.items() if length > 600} == {}


def test_every_subpackage_is_packaged() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {".".join(("instructgym", *path.relative_to(ROOT).parent.parts)) for path in FILES}
    assert sorted(declared) == sorted(found), "[tool.setuptools] packages in pyproject.toml differs from the folders"


def test_version_is_the_installed_one() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert instructgym.__version__ == declared


@pytest.mark.parametrize("env_id", ["instructgym/EvolveInstruction-v0"])
def test_env_is_registered_on_import(env_id: str) -> None:
    assert env_id in gymnasium.registry


# No pattern matches its own source text: this file is among those searched.
FOREIGN = {
    "machine path": re.compile(r"(?<![\w.~\-])/(?:root|work|opt|home|Users)/\w|file:///\w"),
    "registry host": re.compile(
        r"\bpypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|deb\.debian\.org"
    ),
}


def test_no_machine_paths_or_registry_hosts_in_the_repository() -> None:
    # Files that git does not know yet count too, so that the test speaks up before the commit.
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    offences = []
    for name in filter(None, done.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # a picture; a file deleted but not yet staged
            continue
        for number, line in enumerate(text.splitlines(), 1):
            offences += [f"{name}:{number}: {what}: {line.strip()}" for what, rx in FOREIGN.items() if rx.search(line)]
    assert not offences, "\n".join(offences)
