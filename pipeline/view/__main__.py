"""`python -m pipeline.view RUN`: the rollouts and search trees of a run in a browser, or with `--export FILE` as one HTML file."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.arguments import USAGE, OneLineParser, listen, positive
from pipeline.store import Store, StoreError
from pipeline.telemetry import Terminal

_FAILED, _INTERRUPTED = 1, 130
_PORT = 8420
_MOST, _MOST_TREES = 1000, 40


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 when it was stopped or has exported, 1 for a run that cannot be shown, 2 for wrong arguments, 130 when
    interrupted."""
    options, terminal = _parse(arguments), Terminal(None)
    try:
        if not options.run.is_dir():
            terminal.error(f"there is no folder {options.run}")
            return USAGE
        if not any(part.name.isdigit() and part.is_dir() for part in options.run.iterdir()):
            terminal.error(f"{options.run} is no run folder: it holds no rounds")
            return USAGE
        store = Store(options.run)
        return _export(store, options, terminal) if options.export else _serve(store, options, terminal)
    except (StoreError, OSError) as error:
        terminal.error(str(error))
        return _FAILED
    except KeyboardInterrupt:
        terminal.error("interrupted")
        return _INTERRUPTED


def _serve(store: Store, options: argparse.Namespace, terminal: Terminal) -> int:
    try:
        import uvicorn

        from pipeline.view.application import LOOPBACK, Shelf, application
    except ImportError as error:
        terminal.error(f"the server needs {error.name}, which comes with vllm: install extra cpu or gpu, or use --export FILE")
        return USAGE
    from pipeline.view.models import Doubts

    try:
        listening = listen(options.host, options.port)
    except OSError as error:
        terminal.error(f"{error}; --port 0 takes a free one")
        return USAGE
    shelf = Shelf(store)
    library = shelf.library()
    for note in library.notes:
        terminal.warn(note)
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    if not ipaddress.ip_address(host).is_loopback:
        terminal.warn(f"whoever reaches {name}:{port} can read this run")
    hosts = list(dict.fromkeys([*LOOPBACK, name, options.host, *options.allowed_host]))
    app = application(shelf, Doubts(store), library.name, hosts)
    terminal.info(f"{len(library.table):,} rollouts of {library.name} at http://{name}:{port}/ (Ctrl-C ends it)")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _export(store: Store, options: argparse.Namespace, terminal: Terminal) -> int:
    from pipeline.view.filters import FilterError, Filters, Selection, evenly
    from pipeline.view.library import Library
    from pipeline.view.models import Doubts
    from pipeline.view.pages import Pages

    library = Library(store)
    for note in library.notes:
        terminal.warn(note)
    try:
        asked = dict(one.split("=", 1) for one in options.where)
        selection = Selection(library.table, Filters.parse(asked, library.table), library.search)
    except FilterError as error:
        terminal.error(f"--where {error}")
        return USAGE
    numbers = [int(number) for number in evenly(selection.rows, options.most)]
    rollouts, found, doubts = [], {}, Doubts(store)
    with terminal.stage("export", len(numbers)) as progress:
        for number in numbers:
            rollouts.append(library.rollout(number))
            ask = library.ask(number) if options.p_undo else None
            if ask and ask.ids:
                found[number] = doubts.of(ask)
            progress.advance()
    if options.p_undo and len(found) < len(rollouts):
        terminal.warn(f"no P(U) for {len(rollouts) - len(found)} rollouts: nothing was written, or the model is not in the run")
    places = library.tree_lines()
    drawn = [library.tree(*places[at]) for at in range(0, len(places), -(-len(places) // _MOST_TREES) or 1)]
    html = Pages().exported(library, selection, rollouts, found, drawn)
    target: Path = options.export
    if target.is_dir():
        target /= "rollouts.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.write_text(html, encoding="utf-8")
    part.replace(target)
    terminal.info(f"{len(rollouts):,} of {len(selection.rows):,} rollouts: {target}, {target.stat().st_size / 1e6:.1f} MB")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m pipeline.view", description="Look at the rollouts and search trees of a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/tiny; it is only read")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)")
    parser.add_argument("--port", type=int, default=_PORT, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        type=_host_name,
        metavar="NAME",
        help="another name by which browsers may call this server",
    )
    parser.add_argument("--export", type=Path, metavar="FILE", help="write one HTML file, or into a folder, and end")
    parser.add_argument(
        "--where", action="append", default=[], type=_condition, metavar="FIELD=VALUE",
        help="export what fits, by the fields of the page's address, such as verdict=wrong or undos_from=1",
    )  # fmt: skip
    parser.add_argument("--most", type=positive, default=_MOST, metavar="N", help="rollouts to export (default: %(default)s)")
    parser.add_argument("--p-undo", action="store_true", help="export P(U) behind every token: asks the run's models")
    return parser.parse_args(arguments)


def _host_name(text: str) -> str:
    if not text or not all(char.isalnum() or char in ".-:[]" for char in text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a host")
    return text


def _condition(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    return text


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
