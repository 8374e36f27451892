"""What was pushed to which registry from this folder: the digest by which a cluster gets exactly that build."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.launch.image_inputs import look_at_inputs
from trainer.records import read_json, write_json
from trainer.run.folder import make_ignored

RECORD = Path(".muster/images.json")
"""Of the working directory. Nobody needs to keep it in git: it says what this machine has pushed."""


def record_push(image: str, digest: str, tag: str, words: Sequence[str]) -> None:
    """Note the digest, `name@sha256:...`, of an image of a site file that was pushed, and what it was made of."""
    make_ignored(RECORD.parent)
    known = {"digest": digest, "tag": tag, "words": [*words]}
    write_json(RECORD, {**(read_json(RECORD) or {}), image: known})


def pushed(image: str) -> str:
    """The image of a site file by the digest that was pushed from here, as far as that is known."""
    return str(_known(image).get("digest", image))


@functools.cache  # once for all runs of a sweep
def note_other_inputs(image: str) -> None:
    """Say so if the image would be another one if it were made now."""
    known = _known(image)
    if known and look_at_inputs(Path.cwd(), known["words"]).tag != known["tag"]:
        note = "was pushed before the Dockerfile, a file that it copies, or Muster changed. Jobs still use it"
        print(f"note: {image} {note}: `muster image --push` makes the new one", file=sys.stderr)


def _known(image: str) -> dict[str, Any]:
    found = (read_json(RECORD) or {}).get(image)
    return found if isinstance(found, dict) else {}
