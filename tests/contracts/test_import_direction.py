"""The direction of imports: who may know whom, held against every import statement in the project."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LEAVES = (
    "ldm.util",
    "ldm.exposure",
    "ldm.ledger",
    "ldm.out_of_memory",
    "ldm.checkpoint",
    "ldm.diffusers_format",
    "ldm.lr_scheduler",
    "ldm.optimizers",
)

# Module prefix -> prefixes of `ldm` that it may import. The longest matching prefix counts. Models and data sets are
# reached from ldm.training through `target:` strings, so it imports neither. Scripts that look at data need no run.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "main": ("ldm.training", "ldm.data.data_module", "ldm.util"),
    "scripts": ("ldm.training", "ldm.data", "ldm.modules.encoders.tokenizer", *LEAVES),
    "ldm.training": ("ldm.training", *LEAVES),
    "ldm.models": ("ldm.models", "ldm.modules", *LEAVES),
    "ldm.modules": ("ldm.modules", "ldm.util"),
    "ldm.data": ("ldm.data", "ldm.util", "ldm.exposure"),
    "ldm.util": (),
    "ldm.exposure": (),
    "ldm.ledger": ("ldm.exposure",),
    "ldm.out_of_memory": (),
    "ldm.checkpoint": (),
    "ldm.diffusers_format": ("ldm.checkpoint", "ldm.util"),
    "ldm.lr_scheduler": (),
    "ldm.optimizers": ("ldm.util",),
    "ldm": (),
}

LIGHTNING_USERS = (
    "ldm.models.diffusion.ddpm",
    "ldm.models.autoencoder",
    "ldm.data.data_module",
    "ldm.training",
    "scripts",
)
TAMING_USERS = ("ldm.models.autoencoder", "ldm.modules.losses")


def is_below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def project_modules() -> dict[str, Path]:
    files = [ROOT / "main.py", *ROOT.glob("scripts/*.py"), *ROOT.glob("ldm/**/*.py")]
    modules = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = project_modules()


def statements(tree: ast.AST, with_types: bool) -> Iterator[ast.AST]:
    """Yield every node, without the bodies of ``if TYPE_CHECKING:`` unless asked for."""
    for node in ast.iter_child_nodes(tree):
        type_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if with_types or not type_only:
            yield node
            yield from statements(node, with_types)


def imported_names(source: str, module: str, is_package: bool, with_types: bool = True) -> Iterator[str]:
    """Yield the dotted name of everything imported, also inside functions."""
    for node in statements(ast.parse(source), with_types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(module: str, with_types: bool = True) -> set[str]:
    path = MODULES[module]
    return set(imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", with_types))


def project_imports_of(module: str) -> set[str]:
    """Name the project's modules that a module loads (``from a.b import c`` may mean a.b.c or a name in a.b)."""
    found = set()
    for name in imports_of(module, with_types=False):
        candidates = (name, name.rpartition(".")[0])
        found.update(next(([candidate] for candidate in candidates if candidate in MODULES), []))
    return found


def forbidden_imports(module: str, imported: set[str]) -> set[str]:
    row = max((prefix for prefix in MAY_IMPORT if is_below(module, prefix)), key=len)
    ours = {name for name in imported if is_below(name, "ldm") or name == "main" or name.startswith("main.")}
    return {name for name in ours if not any(is_below(name, allowed) for allowed in MAY_IMPORT[row])}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_row_allows(module: str) -> None:
    assert not forbidden_imports(module, imports_of(module))


def test_the_table_catches_an_import_in_the_wrong_direction() -> None:
    source = "def f():\n    from ldm.training import run\n    from ...models import autoencoder\n"
    imported = set(imported_names(source, "ldm.modules.encoders.modules", is_package=False))
    assert forbidden_imports("ldm.modules.encoders.modules", imported) == {
        "ldm.training.run",
        "ldm.models.autoencoder",
    }


@pytest.mark.parametrize(
    ("package", "users"),
    [("pytorch_lightning", LIGHTNING_USERS), ("lightning", LIGHTNING_USERS), ("taming", TAMING_USERS)],
)
def test_a_heavy_package_is_loaded_by_its_few_users_alone(package: str, users: tuple[str, ...]) -> None:
    importers = {
        module for module in MODULES if any(is_below(name, package) for name in imports_of(module, with_types=False))
    }
    assert {module for module in importers if not any(is_below(module, user) for user in users)} == set()


def test_data_code_knows_no_cuda() -> None:
    offenders = {
        module
        for module in MODULES
        if is_below(module, "ldm.data")
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "cuda"
    }
    assert offenders == set()


def test_imports_form_no_cycle() -> None:
    graph = {module: project_imports_of(module) - {module} for module in MODULES}
    while True:
        free = {module for module, needed in graph.items() if not needed}
        if not free:
            break
        graph = {module: needed - free for module, needed in graph.items() if module not in free}
    assert sorted(graph) == [], "these modules import each other in a circle, or import modules that do"
