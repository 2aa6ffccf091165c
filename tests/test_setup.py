"""The front door: pyproject.toml, constraints.txt and environment.yml agree, and a set-up that cannot work says so in one line."""

import os
import shutil
import subprocess
import tomllib
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PIP = ENVIRONMENT["dependencies"][-1]["pip"]


def pins() -> dict[str, str]:
    """Package -> version, from constraints.txt; each line of it pins one."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, _, pinned in (line.partition("==") for line in lines)}


def needed(package: str, extra: str = "") -> set[str]:
    """What a package, with an extra of it, needs on this machine: its requirements and theirs, by name."""
    installed = {canonicalize_name(found.name): found for found in distributions()}
    found: set[str] = set()
    todo = [(package, extra)]
    while todo:
        name, extra = todo.pop()
        for requirement in map(Requirement, installed[canonicalize_name(name)].requires or []):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if applies and (dependency := canonicalize_name(requirement.name)) not in found:
                found.add(dependency)
                todo += [(dependency, "")] + [(dependency, e) for e in requirement.extras]
    return found


def test_every_package_that_is_needed_is_pinned_to_the_version_that_runs_here() -> None:
    pinned, packages = pins(), needed("minisd3", "test")
    loose = {name for name in packages if name not in pinned and not name.startswith(("nvidia-", "triton"))}
    assert not loose, f"constraints.txt lacks {sorted(loose)}"
    installed = {name: version(name).partition("+")[0] for name in packages & pinned.keys()}
    other = {name: found for name, found in installed.items() if found != pinned[name]}
    assert not other, f"constraints.txt pins other versions than those installed: {other}"


def test_a_build_of_torch_is_left_open() -> None:
    assert pins()["torch"] == "2.13.0"  # and not 2.13.0+cpu: the same line serves CPU, CUDA and MPS


def test_the_pins_fulfil_what_pyproject_asks() -> None:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_conda_and_binder_get_the_same_pins() -> None:
    assert set(ENVIRONMENT) == {"name", "channels", "dependencies"}
    assert "-c constraints.txt" in PIP
    assert "-e ." in PIP
    python = next(entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str) and entry.startswith("python="))
    assert PROJECT["requires-python"] == ">=" + python.removeprefix("python=")


def test_conda_and_make_take_the_cpu_build_from_the_same_place() -> None:
    index = next(line.split()[1] for line in PIP if line.startswith("--extra-index-url"))
    assert f"cpu_index={index}\n" in (ROOT / "tools" / "setup.sh").read_text()


# --- set-ups that cannot work, acted out with stand-ins for the programs that setup.sh asks


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, without a .venv, and a folder bin/ for stand-ins."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    return tmp_path


def stand_in(checkout: Path, program: str, script: str) -> None:
    path = checkout / "bin" / program
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def set_up(checkout: Path, *command: str, **variables: str) -> list[str]:
    """The lines that a failing set-up says, without make's own."""
    environment = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "HOME": str(checkout)} | variables
    done = subprocess.run(
        command or ["tools/setup.sh"], cwd=checkout, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    return [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make: ***")]


OLD_PYTHON = 'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac'


def test_an_old_python_is_refused(checkout: Path) -> None:
    for program in ("python3", "python3.14", "python3.13", "python3.12", "python3.11"):
        stand_in(checkout, program, OLD_PYTHON)
    (line,) = set_up(checkout, "make", "lab")
    assert line.startswith("minisd3: Python 3.11 or newer is needed, and python3 is Python 3.9.2;")


def test_an_old_python_is_refused_by_name(checkout: Path) -> None:
    stand_in(checkout, "mypython", OLD_PYTHON)
    (line,) = set_up(checkout, "make", "lab", PYTHON="mypython")
    assert "mypython is Python 3.9.2;" in line
    (line,) = set_up(checkout, PYTHON="python9")
    assert "python9 is missing;" in line


def test_a_full_disk_is_noticed_before_anything_is_installed(checkout: Path) -> None:
    stand_in(checkout, "nvidia-smi", "exit 1")
    stand_in(checkout, "df", "echo Filesystem Blocks Used Available; echo /dev/root 9000000 7900000 1100000")
    (line,) = set_up(checkout)
    assert line.startswith("minisd3: PyTorch and JupyterLab need 12 GiB of free disk, and ")
    assert line.endswith("has 1; free some, or clone elsewhere")
    assert not (checkout / ".venv").exists()


def test_a_python_without_venv_is_noticed(checkout: Path) -> None:
    stand_in(checkout, "python3", 'case "$2" in *venv*) exit 1;; esac')
    (line,) = set_up(checkout)
    assert line.endswith("on Debian and Ubuntu: sudo apt-get install python3-venv")


def test_an_index_that_does_not_answer_ends_in_one_line_below_pips_own(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    stand_in(checkout, "../.venv/bin/python", 'case "$*" in *urllib*|*pip\\ install*) echo "no network" >&2; exit 1;; esac')
    *_, reason, line = set_up(checkout, "make", "lab")
    assert reason == "no network"
    assert line.startswith("minisd3: pip could not install the packages; its reason is above")
    assert not (checkout / ".venv" / "ready").exists()


def test_an_unknown_target_names_the_targets(checkout: Path) -> None:
    (line,) = set_up(checkout, "make", "labb")
    assert "there is no target 'labb'; the targets are: help lab test" in line
