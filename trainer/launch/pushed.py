"""What was pushed to which registry from this folder: the digest by which a cluster gets exactly that build."""

from pathlib import Path

from trainer.records import read_json, write_json

RECORD = Path(".muster/images.json")
"""Of the working directory. Nobody needs to keep it in git: it says what this machine has pushed."""


def record_push(image: str, digest: str) -> None:
    """Note the digest, `name@sha256:...`, that an image of a site file has since it was pushed."""
    if not RECORD.parent.exists():
        RECORD.parent.mkdir()
        (RECORD.parent / ".gitignore").write_text("*\n")
    write_json(RECORD, {**(read_json(RECORD) or {}), image: digest})


def pushed(image: str) -> str:
    """The image of a site file by the digest that was pushed from here, as far as that is known."""
    found = (read_json(RECORD) or {}).get(image)
    return found if isinstance(found, str) else image
