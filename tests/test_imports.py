"""Imports point one way, and each room uses only the libraries it may."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "flexlora"

BELOW = {
    "lowrank": set(),
    "adapter": {"lowrank"},
    "federation": {"adapter", "lowrank"},
    "methods": {"adapter", "federation", "lowrank"},
    "data": {"adapter"},
    "training": {"adapter", "data", "federation", "lowrank"},
    "engines": {"adapter", "data", "federation", "lowrank", "methods", "training"},
    "experiment": {"adapter", "data", "engines", "federation", "lowrank", "methods", "training"},
    "cli": {"experiment"},
    "flower": {"engines", "experiment"},
}
"""Room -> the rooms it may import."""

TORCH_ONLY = {"torch", "jaxtyping"}
LIBRARIES = {
    "lowrank": TORCH_ONLY,
    "methods": TORCH_ONLY,
    "adapter": TORCH_ONLY | {"safetensors"},
    "federation": TORCH_ONLY | {"safetensors"},
}


def files() -> list[Path]:
    return [p for p in sorted(SOURCE.rglob("*.py")) if p.name not in {"__init__.py", "__main__.py"}]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole path"
            names.add(node.module)
            if node.module == "flexlora":
                names |= {f"flexlora.{alias.name}" for alias in node.names}
    return names - {"flexlora"}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_one_way(path):
    own = room(path)
    rooms = {n.split(".")[1] for n in imported(path) if n.startswith("flexlora.")}
    assert rooms - {own} <= BELOW[own]
    libraries = {n.split(".")[0] for n in imported(path)} - {"flexlora", *sys.stdlib_module_names}
    assert libraries <= LIBRARIES.get(own, libraries)
    if "transformers" in libraries:
        assert path.relative_to(SOURCE).as_posix() in {
            "training/models.py",
            "training/attention.py",
            "training/quantized.py",
        }


def test_federation_below_methods_only_through_values():
    for path in files():
        if room(path) == "methods":
            below = {n for n in imported(path) if n.startswith("flexlora.federation")}
            assert below <= {"flexlora.federation.state"}, path


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from flexlora import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'peft', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_names_for_scripts_are_all_there():
    import flexlora

    for name in flexlora.__all__:
        assert getattr(flexlora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = flexlora.nothing
