"""`stripewell recover`: what is left of a pool, and a volume out of it, without a daemon.

Added to the command line by `cli`. What is heavy is loaded when the command runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from stripewell.errors import UserError, one_line
from stripewell.progress import shown
from stripewell.recover.values import plain
from stripewell.sizes import format_size

if TYPE_CHECKING:
    from stripewell.recover.remains import Finding, Remains
    from stripewell.recover.sinks import Sink
    from stripewell.recover.sources import Source

_STREAM = "-"
_CHANGED = "the pool was written to meanwhile: stop its daemon and try again"


@click.command("recover")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("--volume", metavar="NAME", help="Restore this volume; with --to.")
@click.option("--to", "target", metavar="FILE", help="A new file, a disk (--force), - for stdout.")
@click.option("--incomplete", is_flag=True, help="Restore what there is; lost blocks become zeros.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("--verify", is_flag=True, help="Read every block before saying what is restorable.")
@click.option("--generation", type=click.IntRange(0), metavar="N", help="Use an older root.")
@click.option("--digest", metavar="PREFIX", help="Use the root whose digest begins like that.")
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
@click.pass_context
def recover(ctx: click.Context, /, urls: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Read a pool without a daemon: list its volumes, or restore one.

    The last resort, when a pool cannot be served any more. Name all devices that are left; stop the
    daemon first. Nothing is ever written to them. Exit status 1 says that something is missing.
    """
    if (options["volume"] is None) != (options["target"] is None):
        raise click.UsageError("--volume and --to belong together", ctx)
    ctx.exit(asyncio.run(_recover(urls, as_json=as_json, **options)))


async def _recover(urls: tuple[str, ...], **wanted: Any) -> int:
    """The exit status. A call that hangs in the kernel can only be left behind, and ends with the
    process: to leave that in the ordinary way would be to wait for it."""
    from stripewell.recover.sources import open_sources

    sources = await open_sources(urls)
    try:
        status = await _work(sources, **wanted)
    except UserError as error:
        if not any(source.hangs for source in sources):
            raise
        click.echo(f"stripewell: {error}", err=True)
        status = 1
    finally:
        for source in sources:
            await source.close()
    if any(source.hangs for source in sources):
        sys.stdout.flush()
        os._exit(status)
    return status


async def _work(
    sources: list[Source],
    *,
    volume: str | None,
    target: str | None,
    incomplete: bool,
    force: bool,
    verify: bool,
    generation: int | None,
    digest: str | None,
    as_json: bool,
) -> int:
    from stripewell.recover.remains import assemble

    remains = await assemble(sources, generation, digest)
    if volume is None or target is None:
        return await _list(remains, verify=verify, as_json=as_json)
    return await _restore(
        remains, volume, target, incomplete=incomplete, force=force, as_json=as_json
    )


async def _list(remains: Remains, *, verify: bool, as_json: bool) -> int:
    from stripewell.recover import report

    findings = []
    for name in sorted(remains.catalog.volumes):
        with shown(f"read {plain(name)}") as progress:
            found = remains.catalog.volumes[name]
            findings.append(await remains.examine(found, progress, verify=verify))
    if await remains.changed():
        remains.problems.add(_CHANGED)
    data, volumes = report.pool_data(remains), [report.volume_data(one) for one in findings]
    text = report.pool_text(data, report.result(remains), volumes)
    click.echo(json.dumps({"pool": data, "volumes": volumes}, indent=2) if as_json else text)
    whole = all(volume["restorable"] == "yes" for volume in volumes)
    return 0 if data["complete"] and whole and not data["problems"] else 1


async def _restore(
    remains: Remains, name: str, target: str, *, incomplete: bool, force: bool, as_json: bool
) -> int:
    from stripewell.recover.restore import restore
    from stripewell.recover.sinks import StreamSink, open_sink

    volume = remains.volume(name)
    urls = [source.url for source in remains.sources]
    if not incomplete:
        _refuse_gaps(remains)
        with shown(f"look through {plain(name)}") as progress:
            _refuse_loss(await remains.examine(volume, progress))
    sink: Sink
    if target == _STREAM:
        sink = StreamSink(sys.stdout.buffer)
    else:
        sink = open_sink(target, volume.size, urls, force=force)
    try:
        with shown(f"restore {plain(name)}") as progress:
            finding = await restore(remains, volume, sink, progress)
        if await remains.changed():
            raise UserError(_CHANGED)
        if not incomplete:
            _refuse_loss(finding)
        sink.finish(volume.size)
    except BaseException as error:
        sink.abandon()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UserError(f"{target}: {one_line(error)}: give it room, or another FILE") from None
        raise
    return _tell(remains, finding, target, as_json=as_json)


def _refuse_gaps(remains: Remains) -> None:
    """Raises UserError unless everything that was ever flushed is there."""
    if gaps := remains.gaps():
        text = "; ".join(gaps)
        raise UserError(f"{text}: bring devices back, or --incomplete to restore what there is")


def _refuse_loss(finding: Finding) -> None:
    """Raises UserError if blocks of the volume are lost."""
    if finding.lost.blocks:
        from stripewell.recover.report import lost_text

        what = f"volume {plain(finding.volume.name)}: {lost_text(finding.lost)}"
        remedy = "bring devices back, or --incomplete to have zeros in their place"
        raise UserError(f"{what}: {remedy}")


def _tell(remains: Remains, finding: Finding, target: str, *, as_json: bool) -> int:
    """Say what was restored; on stderr if stdout is the volume. Returns the exit status."""
    from stripewell.recover import report

    data, volume = report.pool_data(remains), report.volume_data(finding)
    whole = data["complete"] and not finding.lost.blocks
    line = report.result(remains)
    text = f"restored {plain(volume['name'])} ({format_size(volume['size'])}) to {target}; {line}"
    if finding.lost.blocks:
        text += f"; {report.lost_text(finding.lost)} and are zeros there"
    both = {"pool": data, "volume": volume, "to": target}
    click.echo(json.dumps(both, indent=2) if as_json else text, err=target == _STREAM)
    return 0 if whole else 1
