"""The package's shape: who may import whom, where pictures are drawn, how long it may grow, and what its text may not say."""

import ast
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minisd3"
LAYERS = [
    {"types", "config"},
    {"attention", "distributed", "flow", "formats", "scenes"},
    {"vae", "mmdit", "text", "guidance", "sampling", "detector"},
    {"controlnet", "lora", "training", "introspect", "evaluate"},
    {"weights", "recipes", "data"},
    {"pipeline"},
    {"family", "finetune"},
    {"scores"},
    {"__init__", "plots", "widgets", "commands"},
    {"__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.glob("*.py"))


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere in it, by full name; of `from minisd3 import flow`, minisd3.flow."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import; write minisd3.{node.module}"
            assert node.module is not None
            names |= {f"minisd3.{alias.name}" for alias in node.names} if node.module == "minisd3" else {node.module}
    return names


def siblings(path: Path) -> set[str]:
    """The package's own files among them; a public name of the package itself (minisd3.load) counts as __init__."""
    parts = [name.split(".") for name in imported(path)]
    return {p[1] if len(p) > 1 and p[1] in LAYER else "__init__" for p in parts if p[0] == "minisd3"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_only_lower_layers(path: Path) -> None:
    assert path.stem in LAYER, f"{path.name} has no layer; the package's files are those of LAYERS"
    wrong = {name for name in siblings(path) if LAYER[name] >= LAYER[path.stem]}
    assert not wrong, f"{path.name} (layer {LAYER[path.stem]}) imports {wrong}, which lie no lower"


@pytest.mark.parametrize("name", ["flow", "guidance", "sampling"])
def test_the_mathematics_knows_no_network(name: str) -> None:
    assert siblings(PACKAGE / f"{name}.py") <= {"types", "config", "flow"}


def test_pictures_are_drawn_in_two_files_only() -> None:
    drawing = {path.stem for path in FILES if any(name.split(".")[0] == "matplotlib" for name in imported(path))}
    assert drawing <= {"plots", "widgets"}


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    passed_over = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tree = ast.parse(path.read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    told = {line for text in texts for line in range(text.lineno, (text.end_lineno or 0) + 1)}
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in passed_over | {tokenize.ENCODING}]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - told)


def test_the_package_stays_small() -> None:
    """What SD3 is stays readable in one sitting; loading, training, drawing and the command line may not outgrow it without end."""
    lines = {path.stem: code_lines(path) for path in FILES}
    model = ("types", "config", "attention", "flow", "vae", "mmdit", "guidance", "sampling", "controlnet", "text")
    assert sum(lines[name] for name in model) < 1500, lines
    assert sum(lines.values()) < 6000, lines


def test_no_text_names_a_place_outside_the_repository() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    places = re.compile(rb"(?<![\w.])/(work|root|home|opt|mnt|Users)/|\.\./shared|file:///")
    texts = [ROOT / name for name in tracked if name and name != "tests/test_layers.py"]
    guilty = [str(path) for path in texts if path.is_file() and places.search(path.read_bytes())]
    assert not guilty
