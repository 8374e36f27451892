"""`python -m trainer.config.reference > docs/configuration.md`: every key of a job file, from its own declaration."""

import dataclasses
import json
from typing import Any, cast

from trainer.config.job import Job


def reference() -> str:
    """The page, in Markdown."""
    lines = ["# Every key of a job file", "",
             "You set a key in the job file or, for one run, as `key=value` on the command line, which wins. All other",
             "keys have these defaults. Muster refuses an unknown key, a wrong type or an impossible combination",
             "before anything starts, and names the nearest valid key (exit code 64).", "",
             "`${oc.env:NAME}` is the value of an environment variable, such as a password. Each start of the run",
             "reads it, so the variable must also be set where the run is continued or requeued. Muster writes the",
             "value nowhere: the run folder, checkpoints and error messages have `${oc.env:NAME}`. What your own code",
             "prints stays as it is. Errors show what is a part of many paths and messages: `USER`, `HOME` and their",
             "like, variables that only `runs` uses, and values below 8 characters. A variable whose name has KEY,",
             "TOKEN, SECRET, PASSW, CREDENTIAL or JWT in it is never shown.", "",
             "This page is generated: `python -m trainer.config.reference > docs/configuration.md`.", ""]  # fmt: skip
    lines += _table("Top level", Job, "")
    for item in dataclasses.fields(Job):
        kind: Any = item.default_factory
        if dataclasses.is_dataclass(kind):
            title = f"`{item.name}`: {(kind.__doc__ or '').strip()}"
            lines += _table(title, cast(type[Any], kind), f"{item.name}.")
    return "\n".join(lines) + "\n"


def _table(title: str, kind: type[Any], prefix: str) -> list[str]:
    lines = [f"## {title}", "", "| key | default | type | meaning |", "| --- | --- | --- | --- |"]
    for item in (item for item in dataclasses.fields(kind) if "help" in item.metadata):
        default = item.default_factory() if callable(item.default_factory) else item.default
        limits = item.metadata.get("choices")
        meaning = item.metadata["help"] + (f" (one of {', '.join(limits)})" if limits else "")
        lines.append(f"| `{prefix}{item.name}` | `{json.dumps(default)}` | {str(item.type).replace('|', 'or')} | "
                     f"{meaning.replace('|', '/')} |")  # fmt: skip
    return [*lines, ""]


if __name__ == "__main__":
    print(reference(), end="")
