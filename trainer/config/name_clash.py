"""A project's own module `trainer`: a task that imports it would get our package. A script gets its own."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

OWN = Path(__file__).resolve().parents[1]


def find_clash(module: str) -> Path | None:
    """The user's `trainer`, if a task's `module`, or what that imports from the user's folders, imports it.

    Nothing is run. Folders of the user are those that do not belong to Python's installation or environment.
    """
    folders = [folder for folder in map(Path, filter(None, sys.path)) if _is_users(folder)]
    candidates = [folder / name for folder in folders for name in (f"{OWN.name}.py", OWN.name)]
    theirs = next((path for path in candidates if path.exists() and path.resolve() != OWN), None)
    if theirs is None:
        return None
    waiting, seen = [(module, folders)], set[Path]()
    while waiting:
        name, places = waiting.pop()
        if name.partition(".")[0] == OWN.name and places is folders:
            if not _is_ours(name):
                return theirs
            continue  # what it imports itself is ours, too
        stems = [place.joinpath(*name.split(".")) for place in places]
        for file in {path for stem in stems for path in (stem.with_suffix(".py"), stem / "__init__.py")} - seen:
            if file.is_file():
                seen.add(file)
                waiting += _imports(file, folders)
    return None


def _is_users(folder: Path) -> bool:
    installed = {"site-packages", "dist-packages"} & set(folder.parts)
    return not installed and not any(folder.is_relative_to(root) for root in (sys.prefix, sys.base_prefix, OWN.parent))


def _is_ours(name: str) -> bool:
    """Whether a name is that of one of our modules, which a task may import. Of the package alone nobody needs any."""
    path = OWN.parent.joinpath(*name.split("."))
    return path != OWN and (path.is_dir() or path.with_suffix(".py").is_file() or _is_ours(name.rpartition(".")[0]))


def _imports(file: Path, folders: list[Path]) -> Iterator[tuple[str, list[Path]]]:
    """What a file imports, each name with the folders that it is looked for in."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, folders) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            places = [file.parents[node.level - 1]] if node.level else folders
            names = [f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names]
            yield from ((name, places) for name in (*names, *filter(None, [node.module])))
