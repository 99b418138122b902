"""Imports go downwards: every module of the package against the floors of docs/architecture.md."""

import ast
import re


def floors(repo) -> dict[str, int]:
    """Floor of each module or folder of the package, as the table gives it."""
    rows = re.findall(
        r"^\| (\d) \| (.*?) \|", (repo / "docs/architecture.md").read_text(), re.MULTILINE
    )
    return {name: int(floor) for floor, cell in rows for name in re.findall(r"`(\w+)/?`", cell)}


def imported(tree: ast.AST) -> set[str]:
    """Parts of the package that the code imports, but names for annotations alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "trelm_ds":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trelm_ds."):
            found.add(node.module.split(".")[1])
    return found


def test_every_module_has_a_floor_and_imports_from_no_higher_one(repo):
    floor, package = floors(repo), repo / "trelm_ds"
    upwards = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        assert name in floor, f"{name} is not in the table of docs/architecture.md"
        for other in imported(ast.parse(path.read_text())):
            if floor.get(other, 0) > floor[name]:
                upwards.append(f"{path.relative_to(repo)} imports {other}")
    assert not upwards
