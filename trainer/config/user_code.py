"""The user's code: where it is imported from, and finding `package.module:Name` without running any of it."""

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from trainer.config.name_clash import find_clash
from trainer.errors import JobError, did_you_mean
from trainer.records import read_json
from trainer.run.folder import RunFolder

MODULE = "-m "
"""How a script begins that is a module: `script: -m package.train`."""

PACKAGES = Path(".muster/packages")
"""Where the snapshot of the code has modules that lay elsewhere, as those of packages that are installed editable."""


def import_paths(job_file: Path | None, python_path: Sequence[str] = ()) -> list[Path]:
    """Where user code is imported from: the working directory, the job file's folder, `python_path`, and `src`.

    Of a run they are those that it was submitted from, or their places in its snapshot of the code.
    """
    working, folder, _ = _folders(job_file)
    return list(dict.fromkeys([working, folder, *python_folders(job_file, python_path)]))


def python_folders(job_file: Path | None, python_path: Sequence[str] = ()) -> list[Path]:
    """The folders that a job's `python_path` names, the working directory's `src`, and what came from elsewhere."""
    working, _, in_snapshot = _folders(job_file)
    folders = [in_snapshot(Path(os.path.normpath(working / entry))) for entry in python_path]
    return [*folders, *(working / place for place in ("src", PACKAGES) if (working / place).is_dir())]


def _folders(job_file: Path | None) -> tuple[Path, Path, Callable[[Path], Path]]:
    """The working directory, the job file's folder, and a function from a folder to its place in the snapshot."""
    working, folder = Path.cwd(), job_file.resolve().parent if job_file else Path.cwd()
    run = RunFolder(folder)
    source = read_json(run.source)
    if source is None:
        return working, folder, lambda path: path
    origin, folder = Path(source["working_directory"]), Path(source["job_folder"])

    def in_snapshot(path: Path) -> Path:
        inside = run.code.is_dir() and path.is_relative_to(origin)
        return run.code / path.relative_to(origin) if inside else path

    return in_snapshot(origin), in_snapshot(folder), in_snapshot


def add_import_paths(job_file: Path | None, python_path: Sequence[str] = ()) -> None:
    """Let user code be imported in this process."""
    sys.path[:0] = [path for path in map(str, import_paths(job_file, python_path)) if path not in sys.path]


class MissingModule(JobError):
    """The module of a task, or of another symbol, is not on this machine."""


def check_symbol(key: str, value: str, arguments: dict[str, Any] | None) -> None:
    """Refuse what is not `package.module:Name`, and for a class `arguments` that it does not take."""
    module, _, name = value.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not name.isidentifier():
        raise JobError(key, value, "is not package.module:Name", "For example trainer.tasks.digits:Digits")
    if clash := find_clash(module):
        problem = f"imports trainer, the name of Muster's own package, and would not get {clash}"
        raise JobError(key, value, problem, "Rename that module, or run your code as a script, which gets its own")
    source = find_source(module)
    if source is None:
        remedy = (
            f"It must be importable from the working directory ({os.getcwd()}), its src, or the job file's folder; set "
            "python_path if it lies elsewhere"
        )
        raise MissingModule(key, value, f"no module {module}", remedy)
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


def check_script(script: str, folder: Path, places: Sequence[Path]) -> None:
    """Refuse a script that is no Python to this interpreter, or a module that is not found in `places` or installed.

    `folder`: where a relative path begins. Raises JobError.
    """
    file: Path | None = folder / script
    if script.startswith(MODULE):
        name = script.removeprefix(MODULE).strip()
        file = find_source(name, places)
        if file is not None and file.name == "__init__.py":
            file = find_source(f"{name}.__main__", places)
        if file is None:
            among = ", ".join(map(str, places))
            raise JobError(
                "script", script, f"no module {name} that can be run", f"Looked into {among}: set python_path"
            )
    if file is None or file.suffix in (".so", ".pyc"):
        return
    try:
        compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
    except OSError as error:
        raise JobError("script", script, f"cannot be read ({error})", "Give a file that you may read") from None
    except (SyntaxError, ValueError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        problem = f"is not Python: {file.name}{line}: {getattr(error, 'msg', error)}"
        raise JobError("script", script, problem, "Correct the source, or give a script in Python") from None


def find_source(module: str, first: Sequence[Path] = ()) -> Path | None:
    """The file that `module` would be imported from, without importing any package on the way.

    `first`: folders that are looked into before those of this process.
    """
    head, *rest = module.split(".")
    spec = PathFinder.find_spec(head, list(map(str, first))) if first else None
    try:
        spec = spec or importlib.util.find_spec(head)
    except (ImportError, ValueError):
        return None
    for name in rest:
        spec = PathFinder.find_spec(name, spec.submodule_search_locations or []) if spec else None
    return Path(spec.origin) if spec and spec.origin else None
