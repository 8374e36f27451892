"""The `muster` command."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.errors import DONE, FAILED, WRONG_JOB, JobError
from trainer.launch import control
from trainer.launch.platform import Phase
from trainer.launch.submit import render_job, run_job, submit_job
from trainer.records import for_programs
from trainer.run.ownership import forbid_group_writes

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Run one PyTorch training job as processes or containers here, on Slurm or on Kubernetes.",
)  # fmt: skip
Argument, Option = typer.Argument, typer.Option

JobFile = Annotated[str, Argument(help="A job file, or a run to continue.", show_default=False)]
JobFileOnly = Annotated[str, Argument(help="A job file.", show_default=False)]
Overrides = Annotated[list[str] | None, Argument(help="key=value, for example train.lr=0.1.")]
ON = "local, docker, slurm or kubernetes; default: where the run was submitted, or local."
On = Annotated[str | None, Option("--on", help=ON)]
Site = Annotated[Path | None, Option("--site", help="Site file; default: the one of the run, or of the platform.")]
RUN = "A run: its folder, the start of its name, or latest."
RunFolder = Annotated[str, Argument(help=RUN, show_default=False)]
RunsOrSweep = Annotated[str, Argument(help="A folder of runs, or a sweep.")]
Runs = Annotated[list[str], Argument(help="Runs and sweeps: folders, starts of names, or latest.", show_default=False)]
Output = Annotated[Path | None, Option("--output", help="The picture, .png or .svg; default: plot.png, here.")]
ProjectFolder = Annotated[Path, Argument(help="The folder of the project; default: this one.", show_default=False)]
Script = Annotated[str | None, Option("--script", help="A script to run, which may exist. Default: a task.")]
BuildWords = Annotated[list[str] | None, Argument(help="After --: more words for docker build.", show_default=False)]
Push = Annotated[bool, Option("--push", help="Push it to the registry that its name in the site file begins with.")]
IMAGE_ON = "docker or kubernetes: its site file names the image. Default: docker; with --push: kubernetes."
ImageOn = Annotated[str | None, Option("--on", help=IMAGE_ON)]
Checkpoints = Annotated[str | None, Option("--checkpoints", help="best, last or all; default: none.")]
Json = Annotated[bool, Option("--json", help="Print JSON, for machines.")]
AllRanks = Annotated[bool, Option("--all-ranks", help="Show what every rank prints. By default: rank 0 of a script.")]
Sweep = Annotated[str | None, Option("--sweep", help="key=value,value: one run for each value.")]
Rank = Annotated[int | None, Option("--rank", help="Print the log of one rank; default: of all nodes.")]
Follow = Annotated[bool, Option("-f", "--follow", help="Go on printing as the log grows.")]
ExportFile = Annotated[Path, Argument(help="The file to write, such as model.pt.", show_default=False)]
ExportStep = Annotated[int | None, Option("--step", help="The step of the checkpoint; default: the newest whole one.")]
Steps = Annotated[int, Option("--steps", help="Timed steps of each run, after its warm-up.")]
Rounds = Annotated[int, Option("--rounds", help="Timed runs of each mode, in turn.")]
Modes = Annotated[list[str] | None, Option("--mode", help="Compare this mode with single and ddp; may be repeated.")]


@app.command()
def run(
    job: JobFile, overrides: Overrides = None, on: On = None, site: Site = None, all_ranks: AllRanks = False,
    sweep: Sweep = None,
) -> None:  # fmt: skip
    """Submit a job and follow it to its end.

    The exit code is that of the job. Ctrl-C stops the job, which saves a checkpoint first. Of a sweep, all runs are
    followed to their ends, and the exit code is 0 if all of them are done.
    """
    if sweep is None:
        raise typer.Exit(run_job(job, overrides or [], on, site, all_ranks))
    from trainer.launch import listing
    from trainer.launch import sweep as sweeps

    made, code = sweeps.run_sweep(job, overrides or [], on, site, sweep, all_ranks)
    print("\n" + listing.sweep_text(listing.compare_sweep(made)))
    raise typer.Exit(code)


@app.command()
def submit(job: JobFile, overrides: Overrides = None, on: On = None, site: Site = None, sweep: Sweep = None) -> None:
    """Submit a job, print its run folder and return."""
    if sweep is None:
        print(submit_job(job, overrides or [], on, site))
        return
    from trainer.launch.sweep import submit_sweep

    made = submit_sweep(job, overrides or [], on, site, sweep)
    if not sys.stdout.isatty():  # a program reads it: a line for each run
        print(*made.runs, sep="\n")
        return
    print(*made.lines, f"`muster list {made.folder.name}` shows their results", sep="\n")


@app.command()
def render(job: JobFile, overrides: Overrides = None, on: On = None, site: Site = None) -> None:
    """Print exactly what `submit` would hand to the platform."""
    print(render_job(job, overrides or [], on, site))


@app.command()
def status(run: RunFolder, as_json: Json = False) -> None:
    """Say where a run stands and, if it failed, why.

    The exit code is 0, also for a run that failed; 1 when the platform cannot be asked.
    """
    found = control.status(run)
    print(for_programs(found) if as_json else control.status_text(found))
    raise typer.Exit(FAILED if found["state"] == Phase.UNKNOWN else DONE)


@app.command()
def logs(run: RunFolder, rank: Rank = None, follow: Follow = False) -> None:
    """Print the logs of a run."""
    control.logs(run, rank, follow)


@app.command()
def pull(run: RunFolder, checkpoints: Checkpoints = None) -> None:
    """Bring the results of a run from elsewhere into its folder here.

    That is logs, metrics, events, TensorBoard files and, if you say which, checkpoints. Repeat it after a cut.
    """
    from trainer.launch import pull as pulling

    print(pulling.pull(run, checkpoints))


@app.command()
def cancel(run: RunFolder) -> None:
    """Save a checkpoint and stop a run for good."""
    control.cancel(run)


@app.command()
def preempt(run: RunFolder) -> None:
    """Rehearse a preemption: the run saves, stops and comes back."""
    control.preempt(run)


@app.command()
def compare(
    job: JobFileOnly, overrides: Overrides = None, steps: Steps = 100, rounds: Rounds = 3, modes: Modes = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure the modes of training here, and say which to use."""
    from trainer.launch.compare import runs as compare  # here: no other verb shall wait for it

    raise typer.Exit(compare.compare(job, overrides or [], steps, rounds, as_json, modes))


@app.command()
def init(folder: ProjectFolder = Path(), script: Script = None) -> None:
    """Write what a project of yours lacks, and overwrite nothing.

    That is a job file, a task or a script, site files, a Dockerfile and a Makefile.
    """
    from trainer.launch import init as project

    print(*project.init(folder, script), sep="\n")


@app.command()
def image(words: BuildWords = None, push: Push = False, on: ImageOn = None, site: Site = None) -> None:
    """Build the image of your project, unless it is up to date.

    Your jobs run in it. It holds Muster and what your project's Dockerfile or requirements name, and none of your code.
    """
    from trainer.launch import image as images

    for line in images.make_image(on, site, push, words or []):
        print(line)


@app.command()
def export(run: RunFolder, file: ExportFile, step: ExportStep = None) -> None:
    """Write the weights of a checkpoint into one file.

    That is plain PyTorch (.pt) or safetensors (.safetensors).
    """
    from trainer.checkpoint import export as exports
    from trainer.run.named import find_run

    folder = exports.export(find_run(run), file, step)
    print(f"{file}: the weights of {folder.name}")


@app.command("list")
def list_(runs: RunsOrSweep = "runs", as_json: Json = False) -> None:
    """List the runs of a folder, or the results of a sweep."""
    from trainer.launch import listing

    print(listing.list_runs(runs, as_json))


@app.command()
def plot(runs: Runs, output: Output = None) -> None:
    """Draw the curves of runs, or of a sweep, into one picture.

    Without matplotlib it prints the command that starts TensorBoard with exactly these runs.
    """
    from trainer.launch import plot as drawing

    raise typer.Exit(drawing.plot(runs, output))


def open_standard_files() -> None:
    """Open what was closed: Python has None for it, and the next file that is opened would take its number."""
    sys.stdin, sys.stdout, sys.stderr = (
        file or open(os.devnull, mode)  # noqa: SIM115
        for file, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )


def main() -> None:
    """Do what the command line says: a mistake of the user is one line and exit code 64."""
    open_standard_files()
    forbid_group_writes()
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)  # the code of typer.Exit, or nothing
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # who read our output, such as `head`, has seen enough; click calls exit then
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
        sys.exit(FAILED if sys.argv[1:2] == ["run"] else DONE)  # a run that nobody follows any more stops, and saves
    except JobError as error:
        message, code = str(error), error.code
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if not (type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message")):
            raise
        message, code = f"{error.format_message()} (see muster --help)", WRONG_JOB
    else:
        sys.exit(code)
    print(f"ERROR: {message}", file=sys.stderr)
    sys.exit(code)
