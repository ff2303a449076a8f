"""Imports point one way, and an API process carries no model library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOTS = {
    "llmboost": Path("shared/llmboost"),
    "llmboost_api": Path("api/llmboost_api"),
    "llmboost_worker": Path("worker/llmboost_worker"),
}
MAY_IMPORT = {
    "llmboost": {"llmboost"},
    "llmboost_api": {"llmboost", "llmboost_api"},
    "llmboost_worker": {"llmboost", "llmboost_worker"},
}
REPOSITORY = Path(__file__).parents[2]


def imported_packages(source: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", ROOTS)
def test_imports_point_one_way(package: str) -> None:
    """llmboost_api -> llmboost <- llmboost_worker, and never between the two sides."""
    sources = sorted((REPOSITORY / ROOTS[package]).rglob("*.py"))
    assert sources
    for source in sources:
        foreign = (imported_packages(source) & ROOTS.keys()) - MAY_IMPORT[package]
        assert not foreign, f"{source} imports {foreign}"


def test_the_api_loads_no_model_library() -> None:
    code = (
        "import sys, llmboost_api.app\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'safetensors', 'llmboost_worker'}\n"
        "print(*sorted(heavy & sys.modules.keys()))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""
