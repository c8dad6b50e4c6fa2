"""The command `ood-heatmap`: each command parses, calls one function of the pipeline and prints.

PyTorch takes seconds to load, so a stage is imported inside its command. Options are described in
``pipeline/config.py``; here are only those that are not settings of a stage.
"""

import contextlib
import io
import os
import sys
from pathlib import Path

import click

from ood_heatmap import __version__
from ood_heatmap.cli_stages import evaluate, index, plan, targets, train
from ood_heatmap.cli_tools import audit, bundle, export, localize, predict, verify
from ood_heatmap.errors import UsageError
from ood_heatmap.options import (
    Command,
    CommandGroup,
    GroupedOption,
    device_option,
    raise_descriptor_limit,
    share_cores,
)
from ood_heatmap.output import log_to_stderr

_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
# the commands that can run under torchrun
_SHARED = ("index", "targets", "train", "evaluate")


@click.group("ood-heatmap", cls=CommandGroup, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="ood-heatmap")
@click.pass_context
def main(context: click.Context) -> None:
    """Show whether, and where, an image is not what a fixed classifier was trained on.

    The four stages, in order: index, targets, train, evaluate. An interrupted stage resumes when
    its command is run again.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and context.invoked_subcommand not in _SHARED:
        raise UsageError(
            f"{context.invoked_subcommand} runs in one process: start it without torchrun. "
            f"Commands that run in several processes are {', '.join(_SHARED)}."
        )
    if os.environ.get("RANK", "0") != "0":
        context.with_resource(contextlib.redirect_stdout(io.StringIO()))
    elif isinstance(sys.stdout, io.TextIOWrapper):
        # a file name that is not UTF-8 is printed escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    raise_descriptor_limit()
    share_cores()
    log_to_stderr(context)


@click.command(cls=Command)
@click.argument("run", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/demo"))
@device_option
@click.option(
    "--open",
    "show_report",
    cls=GroupedOption,
    group="Output",
    is_flag=True,
    help="Open the report in a browser at the end.",
)
@click.pass_context
def demo(context: click.Context, run: Path, device: str, show_report: bool) -> None:
    """Run all four stages in RUN on handwritten digits that come with the dependencies.

    Ends with the addresses of the report and of pictures of some images; --open shows the report.

    \b
    Example:
        ood-heatmap demo runs/demo
    """
    from ood_heatmap.demo import demo_commands
    from ood_heatmap.devices import choose_device
    from ood_heatmap.pipeline.demo import prepare_demo

    # a device that does not exist is refused before anything is written
    choose_device(device)
    data = prepare_demo(run)
    for name, *arguments in demo_commands(run, data):
        arguments += ["--device", device]
        click.echo(f"\n$ ood-heatmap {name} {' '.join(arguments)}")
        command = main.commands[name]
        with command.make_context(name, arguments, parent=context.find_root()) as stage:
            command.invoke(stage)
    report = (run / "evaluation" / "report.html").resolve()
    click.echo(f"\nreport:   {report.as_uri()}")
    click.echo(f"pictures: {(run / 'predictions' / 'pictures').resolve().as_uri()}")
    if show_report and click.launch(str(report)):
        click.echo("no browser could be opened", err=True)


# in the order of use
for _command in (
    index,
    targets,
    train,
    evaluate,
    predict,
    audit,
    localize,
    export,
    bundle,
    plan,
    verify,
    demo,
):
    main.add_command(_command)
