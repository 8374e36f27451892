"""The user's code: where it is imported from, and finding `package.module:Name` by reading its source.

Nothing of the user's runs on the submitting side.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from trainer.errors import JobError, did_you_mean
from trainer.records import read_json
from trainer.run.folder import RunFolder


def import_paths(job_file: Path) -> list[str]:
    """Where user code is imported from: the working directory and the job file's folder.

    Of a run they are those that it was submitted from, or their places in its snapshot of the code.
    """
    run = RunFolder(job_file.resolve().parent)
    source = read_json(run.source)
    if source is None:
        return [os.getcwd(), str(run)]
    working, folder = Path(source["working_directory"]), Path(source["job_folder"])
    if not run.code.is_dir():
        return [str(working), str(folder)]
    inside = folder.is_relative_to(working)
    return [str(run.code), str(run.code / folder.relative_to(working) if inside else folder)]


def add_import_paths(job_file: Path | None) -> None:
    """Let user code be found and imported."""
    paths = import_paths(job_file) if job_file else [os.getcwd()]
    sys.path[:0] = [folder for folder in paths if folder not in sys.path]


def check_symbol(key: str, value: str, arguments: dict[str, Any] | None) -> None:
    """Find `package.module:Name` by reading its source: nothing of the user's is run on the submitting side."""
    module, _, name = value.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not name.isidentifier():
        raise JobError(key, value, "is not package.module:Name", "For example trainer.tasks.digits:Digits")
    source = find_source(module)
    if source is None:
        remedy = f"It must be importable from the working directory ({os.getcwd()}) or the job file's folder"
        raise JobError(key, value, f"no module {module}", remedy)
    if source.suffix != ".py":
        return
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise JobError(key, value, f"{source.name} line {error.lineno}: {error.msg}", "Correct the source") from None
    found = {item.name: item for item in tree.body if isinstance(item, (ast.ClassDef, ast.FunctionDef))}
    if name not in found:
        if {name, "*"} & _other_names(tree):  # looked up for real when the ranks import it
            return
        whole = [f"{module}:{other}" for other in found]
        remedy = did_you_mean(value, whole, "It defines: " + ", ".join(found), 0.75)
        raise JobError(key, value, f"{source.name} defines no {name}", remedy)
    item = found[name]
    if arguments is not None and isinstance(item, ast.ClassDef):
        _check_arguments(item, arguments)


def _other_names(tree: ast.Module) -> set[str]:
    """Names that a module imports or assigns; `*` when it star-imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _check_arguments(item: ast.ClassDef, arguments: dict[str, Any]) -> None:
    start = next((part for part in item.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if start is None or start.args.kwarg is not None:
        return
    names = [argument.arg for argument in (*start.args.args[1:], *start.args.kwonlyargs)]
    for key, value in arguments.items():
        if key not in names:
            remedy = did_you_mean(key, names, f"It takes: {', '.join(names) or 'none'}")
            raise JobError(f"task_args.{key}", value, f"{item.name} has no such argument", remedy)


def find_source(module: str) -> Path | None:
    """The file that `module` would be imported from, without importing any package on the way."""
    head, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(head)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in folders:
        base = Path(folder, *rest)
        for candidate in (base.with_suffix(".py"), base / "__init__.py", *base.parent.glob(base.name + ".*.so")):
            if candidate.is_file():
                return candidate
    return None
