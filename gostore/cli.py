"""The command line. Every command takes ``--json``: its last line is then one JSON object with the figures."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import click

from gostore.core.errors import BadRequest, GoStoreError, NotFound, NotSupported

json_option = click.option("--json", "as_json", is_flag=True, help="End with one line of JSON: the figures.")
seed_option = click.option("--seed", default=1, show_default=True, help="The seed of all randomness.")
nodes_option = click.option(
    "--nodes", default=5, show_default=True, type=click.IntRange(1, 64), help="How many node processes."
)
at_option = click.option(
    "--at", metavar="PATH", default=".gostore", show_default=True,
    help="The cluster's directory (`gostore up --path`), or HOST:PORT with the secret in GOSTORE_SECRET.",
)  # fmt: skip


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """One clear error line and exit status 1 for everything that a user can meet."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except GoStoreError as error:
            if kwargs.get("as_json"):
                click.echo(json.dumps({"error": error.code, "message": error.message, "definite": error.definite}))
            raise click.ClickException(error.message) from None
        except OSError as error:
            raise click.ClickException(f"{error.filename or 'the system'}: {error.strerror or error}") from None

    return run


def report(figures: Mapping[str, Any], *, as_json: bool, title: str) -> None:
    """A table for a person, and behind it one line of JSON when asked for."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in figures.items():
        if not isinstance(value, list | dict):
            table.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    Console().print(table)
    if as_json:
        click.echo(json.dumps(figures))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gostore")
def main() -> None:
    """GoStore: learn, teach and research distributed systems with a real cluster."""


@main.command()
@click.option(
    "--nodes", default=5, show_default=True, type=click.IntRange(2, 64), help="How many; one of them is killed."
)
@click.option(
    "--path", type=click.Path(path_type=Path), help="The directory tree to store.  [default: Python's own library]"
)
@click.option("--kill", metavar="NAME", help="The node to kill.  [default: the one that holds the most chunks]")
@json_option
@command
def demo(nodes: int, path: Path | None, kill: str | None, as_json: bool) -> None:
    """Store a real directory tree, kill a node, recover, and verify every byte."""
    import gostore as gs
    from gostore.experiments.demo import real_files, run, standard_library

    files = real_files(path or standard_library())
    cluster = gs.launch(nodes)
    if kill is not None and kill not in cluster.nodes:
        raise BadRequest(f"--kill {kill}: there is no such node; there are {', '.join(cluster.nodes)}")

    async def job() -> Any:
        async with cluster:
            say(f"{nodes} nodes ready in {cluster.ready_s:.2f} s")
            return await run(cluster, files, kill=kill, progress=say)

    result = asyncio.run(job())
    report(result.to_dict(), as_json=as_json, title="demo")
    if not result.fine:
        sys.exit(1)


def say(text: str) -> None:
    click.echo(text, err=True)


@main.command()
@click.option(
    "--nodes", type=click.IntRange(1, 64), help="How many node processes.  [default: 5, or as many as PATH holds]"
)
@click.option(
    "--path", default=".gostore", show_default=True, type=click.Path(path_type=Path), help="Where the data stay."
)
@json_option
@command
def up(nodes: int | None, path: Path, as_json: bool) -> None:
    """A cluster that stays until Ctrl-C, with its REST address and its page."""
    import gostore as gs

    try:
        from gostore.viz.page import Page
    except ImportError as error:
        raise NotSupported(f"the page needs {error.name}; run: pip install 'gostore[notebook]'") from None

    async def stay() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with gs.launch(nodes, path=path) as cluster, Page(cluster) as page:
            rest = await cluster.rest_url()
            click.echo(f"{len(cluster.nodes)} nodes ready in {cluster.ready_s:.2f} s; data in {path}")
            click.echo(f"REST  {rest}   (token: gostore token --at {path})")
            click.echo(f"page  {page.url}")
            click.echo("Ctrl-C stops it; the data stay.")
            if as_json:
                click.echo(json.dumps({"nodes": len(cluster.nodes), "rest": rest, "page": page.url, "path": str(path)}))
            sys.stdout.flush()
            await stop.wait()

    asyncio.run(stay())


@main.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="A TOML file of settings.")
@click.option("--join", multiple=True, metavar="HOST:PORT", help="A member to join through; may be given again.")
@click.option("--name", help="The node's name, unique in the cluster.")
@click.option("--data-dir", help="A directory for this node alone.")
@json_option
@command
def node(
    config_file: Path | None, join: tuple[str, ...], name: str | None, data_dir: str | None, as_json: bool
) -> None:
    """One node in this process, for any process manager. Settings: file, then GOSTORE_* variables, then options."""
    from gostore.config import NodeConfig
    from gostore.node import run

    options: dict[str, Any] = {"join": list(join) or None, "name": name, "data_dir": data_dir}
    config = NodeConfig.load(config_file, None, **{key: value for key, value in options.items() if value is not None})

    def ready(figures: dict[str, Any]) -> None:
        click.echo(json.dumps(figures) if as_json else "  ".join(f"{k} {v}" for k, v in figures.items()))
        sys.stdout.flush()

    run(config, on_ready=ready)


@main.command()
@click.option(
    "--at", default=".gostore", show_default=True, type=click.Path(path_type=Path), help="The cluster's directory."
)
@click.option("--node", "nodes", multiple=True, metavar="NAME=DIR", help="Instead: a survivor's data directory; all.")
@click.option("--lost", multiple=True, required=True, metavar="NAME", help="A node that is lost for good; name all.")
@click.option(
    "--unsafe-accept-lost-writes", "unsafe", is_flag=True,
    help="Do it. Without this, only what would be done and lost is told.",
)  # fmt: skip
@click.option("--accept-empty-shards", is_flag=True, help="Shards of which nothing is left begin again, empty.")
@json_option
@command
def recover(
    at: Path, nodes: tuple[str, ...], lost: tuple[str, ...], unsafe: bool, accept_empty_shards: bool, as_json: bool
) -> None:
    """UNSAFE: go on after a majority of the masters, or of a shard's replicas, is lost for good.

    All survivors must be stopped, and be given. Acknowledged writes may be lost. The cluster gets a new secret, by
    which the lost nodes are kept out.
    """
    from gostore.recover_command import run

    places: dict[str, Path] = {}
    for entry in nodes:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise BadRequest(f"--node {entry}: expected NAME=DIR, the name of a node and its data directory")
        places[name] = Path(path)
    figures = run(at, places, lost, unsafe=unsafe, accept_empty_shards=accept_empty_shards, say=say)
    report(figures, as_json=as_json, title="recovered")


def client(at: str, job: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    """Run a job with a client of a running cluster."""
    from gostore.client import connect_at

    async def go() -> Any:
        async with connect_at(at) as connection:
            return await job(connection)

    return asyncio.run(go())


@main.command()
@at_option
@json_option
@command
def token(at: str, as_json: bool) -> None:
    """The REST token of a cluster (Authorization: Bearer TOKEN)."""
    from gostore.client import read_connection
    from gostore.core.auth import rest_token

    value = rest_token(read_connection(at).secret)
    click.echo(json.dumps({"token": value}) if as_json else value)


@main.group()
def fs() -> None:
    """Files in a running cluster."""


@fs.command("ls")
@click.argument("path", default="/")
@at_option
@json_option
@command
def fs_ls(path: str, at: str, as_json: bool) -> None:
    """List a directory."""
    entries = client(at, lambda c: c.fs.list(path))
    for entry in entries:
        click.echo(f"{entry['size']:>12,}  {entry['type']:<28}  {entry['name']}")
    if as_json:
        click.echo(json.dumps({"path": path, "entries": entries}))


@fs.command("put")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("path")
@at_option
@json_option
@command
def fs_put(source: Path, path: str, at: str, as_json: bool) -> None:
    """Store a file, or a directory with everything in it."""

    async def job(c: Any) -> dict[str, Any]:
        if source.is_dir():
            return dict(await c.fs.put_tree(source, path))
        header = await c.fs.write(path, source)
        return {"files": 1, "bytes": header["size"]}

    report({"path": path, **client(at, job)}, as_json=as_json, title="stored")


@fs.command("get")
@click.argument("path")
@click.argument("target", type=click.Path(path_type=Path), required=False)
@at_option
@json_option
@command
def fs_get(path: str, target: Path | None, at: str, as_json: bool) -> None:
    """Read a file into TARGET, or onto standard output."""
    if target is None and as_json:
        raise BadRequest("--json needs a TARGET file, as standard output would carry the file itself")

    async def job(c: Any) -> int:
        written = 0
        with open(target, "wb") if target else open(sys.stdout.fileno(), "wb", closefd=False) as out:
            async for piece in c.fs.stream(path):
                out.write(piece)
                written += len(piece)
        return written

    size = client(at, job)
    if as_json:
        click.echo(json.dumps({"path": path, "bytes": size}))


@fs.command("rm")
@click.argument("path")
@click.option("--recursive", "-r", is_flag=True, help="A directory with everything in it.")
@at_option
@json_option
@command
def fs_rm(path: str, recursive: bool, at: str, as_json: bool) -> None:
    """Delete a file or a directory."""
    removed = client(at, lambda c: c.fs.delete(path, recursive=recursive))
    report({"path": path, "entries": removed}, as_json=as_json, title="deleted")


@fs.command("stat")
@click.argument("path")
@at_option
@json_option
@command
def fs_stat(path: str, at: str, as_json: bool) -> None:
    """A path's header."""
    report(client(at, lambda c: c.fs.header(path)), as_json=as_json, title=path)


@main.group()
def db() -> None:
    """Objects in a running cluster. VALUE is JSON; PATH walks into it, e.g. `address.city` or `tags.0`."""


_NOTHING = object()  # no value of a database: None is one


def accessors(path: str) -> list[str | int]:
    """``tags.0`` as ``["tags", 0]``."""
    return [int(part) if part.isdecimal() else part for part in path.split(".") if part]


@db.command("get")
@click.argument("container")
@click.argument("key")
@click.argument("path", default="")
@at_option
@json_option
@command
def db_get(container: str, key: str, path: str, at: str, as_json: bool) -> None:
    """Read an object, or one value in it."""
    value = client(at, lambda c: c.db.get(container, key, *accessors(path), default=_NOTHING))
    if value is _NOTHING:
        where = f" at {path}" if path else ""
        raise NotFound(f"{container} has nothing under {key!r}{where}; `gostore db set` puts something there")
    click.echo(json.dumps({"value": value} if as_json else value, default=repr))


@db.command("set")
@click.argument("container")
@click.argument("key")
@click.argument("value")
@click.argument("path", default="")
@click.option("--create", is_flag=True, help="Create the container when it is not there.")
@at_option
@json_option
@command
def db_set(container: str, key: str, value: str, path: str, create: bool, at: str, as_json: bool) -> None:
    """Write an object, or one value in it."""
    try:
        parsed = json.loads(value)
    except ValueError:
        raise BadRequest(f"VALUE = {value!r}: not JSON; a string needs quotes, e.g. '\"text\"'") from None

    async def job(c: Any) -> None:
        if create:
            await c.db.create_container(container)
        await c.db.set(container, key, parsed, *accessors(path))

    client(at, job)
    if as_json:
        click.echo(json.dumps({"container": container, "key": key}))


@db.command("rm")
@click.argument("container")
@click.argument("key")
@click.argument("path", default="")
@at_option
@json_option
@command
def db_rm(container: str, key: str, path: str, at: str, as_json: bool) -> None:
    """Delete an object, or one value in it."""
    client(at, lambda c: c.db.delete(container, key, *accessors(path)))
    if as_json:
        click.echo(json.dumps({"container": container, "key": key}))


containers_option = click.option(
    "--container", "containers", multiple=True, help="Only this one; may be given again.  [default: all]"
)


@db.command("backup")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@containers_option
@at_option
@json_option
@command
def db_backup(file: Path, containers: tuple[str, ...], at: str, as_json: bool) -> None:
    """Write all containers, as they are at one instant, into FILE. Files (`gostore fs`) are not in it."""
    figures = client(at, lambda c: c.db.backup(file, containers=containers or None))
    report(figures, as_json=as_json, title="backup")


@db.command("restore")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@containers_option
@click.option("--replace", is_flag=True, help="Containers that exist are replaced, with everything in them.")
@at_option
@json_option
@command
def db_restore(file: Path, containers: tuple[str, ...], replace: bool, at: str, as_json: bool) -> None:
    """Bring back the containers of FILE; they appear all at once, at the end. Interrupted: do it again."""
    figures = client(at, lambda c: c.db.restore(file, containers=containers or None, replace=replace))
    report(figures, as_json=as_json, title="restored")


@main.command()
@nodes_option
@seed_option
@click.option(
    "--seeds", default=1, show_default=True, type=click.IntRange(1, 1_000_000), help="How many seeds from there on."
)
@click.option(
    "--seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, 3600, min_open=True),
    help="Virtual seconds of load and faults.",
)
@click.option(
    "--faults", "profile", default="swarm", show_default=True, help="none, crash, network, promised or swarm."
)
@click.option(
    "--replication", default="raft", show_default=True, type=click.Choice(["raft", "primary_backup", "quorum"]),
    help="How db holds its copies; primary_backup and quorum are lessons, which break promises.",
)  # fmt: skip
@click.option(
    "--jobs", default=1, show_default=True, type=click.IntRange(min=0), help="Processes; 0: one for each processor."
)
@click.option(
    "--tally", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
    help="Keep every finished run there, and run only the seeds that it does not have for this commit.",
)  # fmt: skip
@click.option(
    "--shrink", "tries", default=64, show_default=True, type=click.IntRange(min=0),
    help="Runs that may be spent on a smaller schedule for the first failing seed.",
)  # fmt: skip
@click.option("--replay", "token", metavar="TOKEN", help="Run what an earlier failure printed, instead of a seed.")
@click.option("--at", "moment", metavar="N", type=click.IntRange(min=0), help="With --replay: every node at event N.")
@click.option(
    "--save", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="Write the journal and the space-time diagram of the first failing run (or of the replay) there.",
)  # fmt: skip
@json_option
@command
def sim(
    nodes: int, seed: int, seeds: int, seconds: float, profile: str, replication: str, jobs: int, tally: Path | None,
    tries: int, token: str | None, moment: int | None, save: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Simulated runs with all checks on. The same seed gives the same trace; a failing one names its replay."""
    from gostore.experiments import sim_command
    from gostore.experiments.soak import Plan

    if token is not None:
        figures = sim_command.replay_run(token, moment, save, say)
    elif moment is not None:
        raise BadRequest("--at goes with --replay: it stops the run that a token names")
    else:
        plan = Plan(nodes, seconds, profile, replication)
        figures = sim_command.run_seeds(range(seed, seed + seeds), plan, jobs, tally, tries, save, say)
    report({name: value for name, value in figures.items() if name != "replay"}, as_json=False, title="simulation")
    if as_json:
        click.echo(json.dumps(figures))
    if figures["violations"] or figures["unknown"]:
        sys.exit(1)


@main.command()
@click.argument("what", type=click.Choice(["launch", "sim", "db"]))
@click.option(
    "--vs",
    default="",
    help="Peers to run beside us, with commas between them (launch: dask; db: etcd, redis, pysyncobj).",
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 100))
@json_option
@command
def bench(what: str, vs: str, rounds: int, as_json: bool) -> None:
    """Speed, against named peers in the same run. A ratio above 1 means ours is better."""
    peers = [peer for peer in vs.split(",") if peer]
    if what == "sim":
        from gostore.experiments.bench_sim import bench_sim

        if peers:
            raise BadRequest(
                f"--vs {vs}: no peer simulates this node; `bench sim` compares with the targets it was set"
            )
        cases = bench_sim(rounds=rounds, progress=say)
    elif what == "db":
        from gostore.experiments.bench_db import bench_db

        cases = bench_db(peers, rounds=rounds, progress=say)
    else:
        from gostore.experiments.bench_launch import bench_launch

        cases = bench_launch(peers, rounds=rounds, progress=say)
    for case in cases:
        peer = f"   {case['peer_name']} {case['peer']} {case['unit']}, ratio {case['ratio']}" if case["peer"] else ""
        click.echo(f"{case['name']:<52} {case['ours']} {case['unit']}{peer}")
    if as_json:
        click.echo(json.dumps({"bench": what, "cases": cases}))


@main.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--format", "form", default="auto", show_default=True, help="The first line says which.",
    type=click.Choice(["auto", "gostore", "jepsen", "key-value"]),
)  # fmt: skip
@click.option("--steps", default=2_000_000, show_default=True, type=click.IntRange(min=1), help="Bound for each key.")
@click.option("--strict", is_flag=True, help="Transactions must also respect the order of real time.")
@json_option
@command
def check(file: Path, form: str, steps: int, strict: bool, as_json: bool) -> None:
    """Judge a recorded history. Exit status 0: it is fine; 1: it is not, or nobody knows within the bound."""
    from gostore.check import (
        TRANSACTIONS,
        Linearizability,
        Serializability,
        check_linearizable,
        check_serializable,
        read_history,
    )

    begin = time.perf_counter()
    with file.open("rb") as lines:
        history = read_history(lines, str(file), form)
    result: Linearizability | Serializability
    if history.model == TRANSACTIONS:
        result = check_serializable(history, strict=strict)
    else:
        result = check_linearizable(history, steps_max=steps)
    wall_s = round(time.perf_counter() - begin, 6)
    click.echo(result.text())
    figures: dict[str, Any] = {"verdict": result.verdict.value, "ops": len(history), "wall_s": wall_s}
    if as_json:
        click.echo(json.dumps(figures | {"file": str(file), "model": history.model} | result.figures()))
    if not result.fine:
        sys.exit(1)


@main.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--format",
    "form",
    default="text",
    show_default=True,
    type=click.Choice(["text", "svg", "shiviz", "perfetto", "table"]),
    help="A space-time diagram (text, svg), a file for ShiViz or Perfetto, or a table (CSV).",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file to write.  [default: standard output]")
@click.option("--kind", "kinds", multiple=True, help="Only events of this kind; may be given again.")
@click.option("--node", "nodes", multiple=True, help="Only events of this node; may be given again.")
@click.option("--category", "categories", multiple=True, help="Only events of this category; may be given again.")
@click.option("--since", "since_s", type=float, metavar="SECONDS", help="Loop time; see the column time_s.")
@click.option("--until", "until_s", type=float, metavar="SECONDS")
@click.option("--events", "events_max", default=120, show_default=True, help="How many a diagram shows: the latest.")
@json_option
@command
def trace(file: Path, form: str, output: Path | None, events_max: int, as_json: bool, **wanted: Any) -> None:
    """Show or convert FILE, a journal that was saved with `journal.save(FILE)`."""
    from gostore.trace import Journal
    from gostore.trace.convert import convert

    journal = Journal.load(file)
    chosen = {name: value or None for name, value in wanted.items() if name in ("nodes", "categories")}
    limits = {name: wanted[name] for name in ("since_s", "until_s")}
    events = journal.select(*wanted["kinds"], **chosen, **limits)
    if form in ("text", "svg"):
        from gostore.viz.spacetime import space_time

        diagram = space_time(events, events_max=events_max)
        text = diagram.text() if form == "text" else diagram.svg()
    else:
        text = convert(events, form)
    if output is None:
        click.echo(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        figures = {"events": len(events), "format": form, "complete": journal.complete}
        click.echo(json.dumps(figures | {"output": str(output) if output else None}))


@main.group()
def lab() -> None:
    """Labs: list them, run one in JupyterLab, grade a submission."""


labs_option = click.option("--labs", "folder", help="The folder of the labs.")


@lab.command("list")
@labs_option
@json_option
@command
def lab_list(folder: str | None, as_json: bool) -> None:
    """The labs, with what each replaces."""
    from gostore.lab.grader import find_labs, labs_folder

    labs = find_labs(labs_folder(folder))
    for entry in labs:
        click.echo(f"{entry.name:<14} {entry.points_max:>3} points   {entry.title}")
    if as_json:
        rows = [{"name": e.name, "title": e.title, "slot": e.slot, "points_max": e.points_max} for e in labs]
        click.echo(json.dumps({"labs": rows}))


@lab.command("run")
@click.argument("name")
@labs_option
@json_option
@command
def lab_run(name: str, folder: str | None, as_json: bool) -> None:
    """Open a lab's notebook in JupyterLab."""
    import subprocess

    from gostore.lab.grader import labs_folder, load_lab

    entry = load_lab(labs_folder(folder), name)
    notebook = entry.folder / f"{entry.name}.ipynb"
    if as_json:
        click.echo(json.dumps({"lab": entry.name, "notebook": str(notebook)}))
    sys.exit(subprocess.run([sys.executable, "-m", "jupyterlab", str(notebook)], check=False).returncode)


@lab.command("grade")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--reference", is_flag=True, help="Grade the reference solution.")
@labs_option
@seed_option
@json_option
@command
def lab_grade(name: str, file: Path | None, reference: bool, folder: str | None, seed: int, as_json: bool) -> None:
    """Grade FILE (a notebook or a Python file) with the lab's public checks."""
    from dataclasses import asdict

    from gostore.lab.grader import grade, labs_folder, load_lab, read_submission

    entry = load_lab(labs_folder(folder), name)
    if (file is None) == (not reference):
        raise BadRequest("name a FILE to grade, or say --reference")
    result = grade(entry, read_submission(entry.reference if reference else file or Path()), seed=seed)
    for outcome in result.checks:
        mark = "ok  " if not outcome.message else "FAIL"
        click.echo(f"{mark} {outcome.points}/{outcome.points_max}  {outcome.name.replace('_', ' ')}")
        if outcome.message:
            click.echo(f"     {outcome.message}\n     hint: {outcome.hint}   (seed {outcome.seed})")
    click.echo(f"{result.points} of {result.points_max} points")
    if as_json:
        checks = [asdict(outcome) for outcome in result.checks]
        click.echo(json.dumps({"points": result.points, "points_max": result.points_max, "checks": checks}))


if __name__ == "__main__":
    main()
