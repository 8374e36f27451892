"""What people, their editors and their file managers put into a run folder."""

from __future__ import annotations

import shutil
from pathlib import Path


def put_foreign(run: Path) -> list[Path]:
    """Put it there, beside at least one checkpoint."""
    root = run / "checkpoints"
    name = max(path.name for path in root.glob("step-*"))  # is not removed meanwhile
    folders = [root / f"{name}-for-the-paper", root / "best of all"]
    for folder in folders:
        shutil.copytree(root / name, folder)
    links = {root / "step-000000000": folders[1], root / "step-999999998": run / "nowhere"}
    for link, target in links.items():
        link.symlink_to(target)
    names = (
        ".DS_Store",
        "step-notes",
        ".step-000000001.swp",
        ".pending-mine",
        ".replaced-by",
        "step-999999999",
        "\u00b2",
    )
    files = [folder / name for folder in (root, run) for name in names]
    for file in files:
        file.write_text("mine")
    empty = [root / ".pruned-roses", root / "step-locked", run / "step-000000001"]
    for folder in empty:
        folder.mkdir(mode=0)
    return [*folders, *links, *files, *empty]


def missing(foreign: list[Path]) -> list[Path]:
    """What is not there any more, or not whole."""
    wrong = [path for path in foreign if not (path.is_symlink() or path.exists())]
    wrong += [path for path in foreign if path.is_file() and path.read_text() != "mine"]
    return wrong + [path for path in foreign[:2] if {each.name for each in path.iterdir()} != FILES]


NAMES = (".DS_Store", "step-notes", ".step-000000001.swp", ".pending-mine", ".replaced-by", "step-999999999", "\u00b2")
FILES = {"model.pt", "state.pt", "manifest.json"}
