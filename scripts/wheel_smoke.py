"""Build the wheel, install it where the checkout cannot be seen, and check that it works there.

The wheel is built from the source distribution, and that from a clean copy of the checkout, so that neither a stale
``build/`` folder nor a file missing from the distribution can go unnoticed. The throw-away environment borrows the
dependencies of the running one through a ``.pth`` file. Python does not read the ``.pth`` files of a folder added in
this way, so the editable install stays hidden.

Usage: ``python scripts/wheel_smoke.py``
"""

import importlib.metadata
import importlib.resources
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
WRITTEN = ("runs", "wandb")  # by experiments, at the top; experiments/runs is source


def check_installed_package(checkout: Path) -> None:
    """Check the installed package from the inside; runs in the throw-away environment, in an empty folder.

    Extend this one when the package gains something that only works if it was packaged well.
    """
    import instructgym

    package = Path(instructgym.__file__).resolve().parent
    assert not package.is_relative_to(checkout), f"imported from the checkout: {package}"
    assert instructgym.__version__ == importlib.metadata.version("instructgym")

    for generic in ("agents", "envs", "experiments", "llm_backends", "rewards", "scripts", "tests"):
        assert importlib.util.find_spec(generic) is None, f"{generic} is importable without the package's name"

    files = importlib.resources.files("instructgym")
    assert (files / "py.typed").is_file()
    subpackages = [init.parent for init in checkout.glob("*/__init__.py")]
    patterns = ("*.py", "prompts/*.toml", "seed_data/*.jsonl")
    found = [
        path.relative_to(checkout) for folder in subpackages for pattern in patterns for path in folder.rglob(pattern)
    ]
    missing = [str(name) for name in found if not (files / str(name)).is_file()]
    assert not missing, f"left out of the wheel: {missing}"

    import gymnasium

    env = gymnasium.make("instructgym/EvolveInstruction-v0", backend="scripted")
    env.reset(seed=0)
    assert env.step(0)[-1]["reward_valid"], "a step of the installed environment gave no verdict"


def copy_sources(destination: Path) -> None:
    """Copy what git would take, or everything that is not a build product where there is no git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):

        def left_out(folder: str, names: list[str]) -> set[str]:
            return NOT_SOURCE(folder, names) | (set(WRITTEN) if Path(folder) == ROOT else set())

        shutil.copytree(ROOT, destination, ignore=left_out)
        return
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, destination / name)


def build_wheel(scratch: Path) -> Path:
    """Build source distribution and wheel from a clean copy, and check what the wheel would put where."""
    copy_sources(scratch / "source")
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(scratch / "dist"),
        str(scratch / "source"),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}\nwheel smoke test: the build failed")
    (wheel,) = (scratch / "dist").glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    version = wheel.name.split("-")[1]
    subpackages = [f"instructgym/{init.parent.name}/" for init in (scratch / "source").glob("*/__init__.py")]
    modules = [f"instructgym/{module.name}" for module in (scratch / "source").glob("*.py")]
    expected = (*subpackages, *modules, "instructgym/py.typed", f"instructgym-{version}.dist-info/")
    stray = [name for name in names if not name.startswith(expected)]
    assert not stray, f"files that do not belong into the wheel: {stray}"
    assert f"instructgym-{version}.dist-info/licenses/LICENSE" in names
    return wheel


def install(wheel: Path, environment: Path) -> Path:
    """Install only the wheel into a new environment, then lend it our dependencies; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    lent = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (Path(site) / "dependencies.pth").write_text("\n".join(lent) + "\n", encoding="utf-8")
    return python


def main() -> None:
    """Build, install, check."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        wheel = build_wheel(scratch)
        python = install(wheel, scratch / "venv")
        (scratch / "empty").mkdir()
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        # -P keeps the folder of this script off the path.
        check = [str(python), "-P", __file__, "--inside", str(ROOT)]
        done = subprocess.run(check, cwd=scratch / "empty", env=environment)
        if done.returncode != 0:
            sys.exit("wheel smoke test: failed")
        print(f"wheel smoke test: {wheel.name} works outside the checkout")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        check_installed_package(Path(sys.argv[2]))
    else:
        main()
