"""The user's code: where it is imported from, and finding `package.module:Name` without running any of it."""

import ast
import importlib.util
import os
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from trainer.errors import JobError, did_you_mean
from trainer.records import read_json
from trainer.run.folder import RunFolder


def add_import_paths(job_file: Path | None) -> None:
    """Let user code be imported: from the working directory and the job file's folder.

    Of a run they are those that it was submitted from, or their places in its snapshot of the code.
    """
    working, folder = Path.cwd(), job_file.resolve().parent if job_file else Path.cwd()
    run = RunFolder(folder)
    source = read_json(run.source)
    if source is not None:
        working, folder = Path(source["working_directory"]), Path(source["job_folder"])
        if run.code.is_dir():
            folder = run.code / folder.relative_to(working) if folder.is_relative_to(working) else folder
            working = run.code
    sys.path[:0] = [path for path in map(str, dict.fromkeys((working, folder))) if path not in sys.path]


def check_symbol(key: str, value: str, arguments: dict[str, Any] | None) -> None:
    """Refuse what is not `package.module:Name`, and for a class `arguments` that it does not take."""
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
    imported = {node.asname or node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    item = found.get(name)
    if item is None and not {name, "*"} & (imported | assigned):  # those are looked up when the ranks import them
        remedy = did_you_mean(value, [f"{module}:{other}" for other in found], "It defines: " + ", ".join(found), 0.75)
        raise JobError(key, value, f"{source.name} defines no {name}", remedy)
    if arguments is not None and isinstance(item, ast.ClassDef):
        _check_arguments(item, arguments)


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
    for name in rest:
        spec = PathFinder.find_spec(name, spec.submodule_search_locations or []) if spec else None
    return Path(spec.origin) if spec and spec.origin else None
