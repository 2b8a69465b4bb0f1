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

from stripewell.errors import UserError
from stripewell.progress import shown
from stripewell.recover.values import plain
from stripewell.sizes import format_size

if TYPE_CHECKING:
    from stripewell.recover.remains import Finding, Remains
    from stripewell.recover.sinks import Sink
    from stripewell.recover.sources import Source

_STREAM = "-"


@click.command("recover")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("--volume", metavar="[POOL/]VOLUME", help="Restore it; with --to.")
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
    _warn_of_writers(sources)
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
        try:
            sys.stdout.flush()
        except OSError:
            status = 1
        os._exit(status)
    return status


def _warn_of_writers(sources: list[Source]) -> None:
    """A warning only: whatever else is wrong, what can be read is still worth reading."""
    if urls := [plain(source.url) for source in sources if source.in_use]:
        from stripewell.recover.choice import plain_list

        what = f"another process, a daemon perhaps, may write to {plain_list(urls)} meanwhile"
        remedy = "what is read may be torn between two states: stop it first"
        click.echo(f"stripewell: warning: {what}, and {remedy}", err=True)


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
    await remains.changed()
    data = report.pool_data(remains, findings)
    volumes = [report.volume_data(remains, one) for one in findings]
    text = report.pool_text(data, report.result(remains, findings), volumes)
    click.echo(json.dumps({"pool": data, "volumes": volumes}, indent=2) if as_json else text)
    return 0 if data["complete"] else 1


async def _restore(
    remains: Remains, name: str, target: str, *, incomplete: bool, force: bool, as_json: bool
) -> int:
    from stripewell.recover.remains import WRITTEN_TO
    from stripewell.recover.restore import restore
    from stripewell.recover.sinks import failed, open_sink, open_stdout

    volume = remains.volume(name)
    urls = [source.url for source in remains.sources]
    if not incomplete:
        _refuse_doubts(remains)
        with shown(f"look through {plain(name)}") as progress:
            _refuse_loss(remains, await remains.examine(volume, progress))
    stream = target == _STREAM
    sink = open_stdout() if stream else open_sink(target, volume.size, urls, force=force)
    try:
        with shown(f"restore {plain(name)}") as progress:
            stop = stream and not incomplete
            finding = await restore(remains, volume, sink, progress, stop=stop)
        if finding.lost.blocks and not incomplete:
            _refuse_loss(remains, finding, _end_stream(sink, finding) if stream else "")
        if await remains.changed():
            raise UserError(WRITTEN_TO)
        sink.finish(volume.size)
    except BaseException as error:
        sink.abandon()
        if isinstance(error, OSError):
            raise failed(sink, target, error) from None
        raise
    return _tell(remains, finding, target, as_json=as_json)


def _end_stream(sink: Sink, finding: Finding) -> str:
    """Write the zeros that a stream lacks before the first loss, and say how far it came."""
    from stripewell.recover.root import BLOCK

    end = finding.lost.kept[0][0] * BLOCK
    sink.finish(end)
    return f"; the {end} bytes before are right, and written"


def _refuse_doubts(remains: Remains) -> None:
    """Raises UserError if the pool is not known to be all that was ever flushed."""
    if doubts := remains.doubts():
        text = "; ".join([*doubts, *remains.damaged()])
        raise UserError(f"{text}: bring devices back, or --incomplete to restore what there is")


def _refuse_loss(remains: Remains, finding: Finding, so_far: str = "") -> None:
    """Raises UserError if blocks of the volume are lost; `so_far` says what was done already."""
    if finding.lost.blocks:
        from stripewell.recover.report import lost_text

        lost = f"volume {plain(finding.volume.name)}: {lost_text(finding.lost)}{so_far}"
        what = "; ".join([lost, *remains.damaged()])
        remedy = "bring devices back, or --incomplete to have zeros in their place"
        raise UserError(f"{what}: {remedy}")


def _tell(remains: Remains, finding: Finding, target: str, *, as_json: bool) -> int:
    """Say what was restored; on stderr if stdout is the volume. Returns the exit status."""
    from stripewell.recover import report

    data = report.pool_data(remains, [finding])
    volume = report.volume_data(remains, finding)
    line = report.result(remains, [finding], "everything of it")
    if finding.lost.blocks:
        line += "; there are zeros where blocks are lost"
    text = f"restored {plain(volume['name'])} ({format_size(volume['size'])}) to {target}; {line}"
    both = {"pool": data, "volume": volume, "to": target}
    text = "\n".join([text, *(f"damage: {line}" for line in data["damaged"])])
    click.echo(json.dumps(both, indent=2) if as_json else text, err=target == _STREAM)
    return 0 if data["complete"] else 1
