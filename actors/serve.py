"""`python -m actors.serve --model DIR`: OpenAI's interface to a saved model that takes its mistakes back.

vLLM's own server is not used, and why: it runs its engine in another process, whose requests know nothing of each other. A
rewind ends one request and begins another with shorter ids, and bans, caps and the run of undos have to pass from the first to
the second; between two processes that state would be kept twice, and leak whenever a client goes. So the engine runs here, in one
thread (actors/service.py) that steps it with the requests of all clients in one batch: vLLM's LLMEngine with our logits processor
loaded as its plug-in (actors/decode_vllm.py), or a ragged cache of transformers (actors/decode.py). A small ASGI application
(actors/openai_api.py) speaks HTTP.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from transformers.utils import logging

from actors.decode import HfLive
from actors.engines import VllmEngine, engine_kind
from actors.generate import add_answer_options, given_settings, load_decoder
from actors.live import Live
from actors.saved import InputError, SavedModel
from actors.service import Service
from pipeline.arguments import USAGE, OneLineParser, listen, positive
from pipeline.config import EngineSettings

_FAILED, _INTERRUPTED = 1, 130
_ROW_TOKENS = 4096  # of a row, unless the model's context is shorter or the user says more
_PATIENCE = 5  # seconds for streams to end when the server stops


def main(arguments: Sequence[str], out: TextIO, err: TextIO) -> int:
    """Exit code: 0 when it was stopped, 1 for an engine that failed, 2 for what cannot be served, 130 when interrupted."""
    options = _parse(arguments)
    try:
        import uvicorn

        from actors.openai_api import application
    except ImportError as error:
        err.write(f"error: the server needs {error.name}, which comes with vllm: install extra cpu or gpu\n")
        return USAGE
    try:
        saved = SavedModel.load(options.model, given_settings(options))
        row_tokens = min(saved.context, options.max_model_len or _ROW_TOKENS)
        listening = listen(options.host, options.port)
        service = Service(_maker(options, saved, row_tokens))
    except (InputError, OSError, RuntimeError) as error:
        err.write(f"error: {error}\n")
        return USAGE
    try:
        service.start()
    except Exception as error:  # an engine may fail with anything; the user gets one line
        err.write(f"error: {saved.folder} cannot be served: {' '.join(str(error).split())[:300]}\n")
        return USAGE
    name = options.name or saved.folder.name
    app = application(saved, service, name, row_tokens)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_PATIENCE)
    host, port = listening.getsockname()[:2]
    out.write(f"{name} at http://{host}:{port}/v1\n")
    out.flush()
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        service.stop()
    return _FAILED if service.error else 0


def _maker(options: argparse.Namespace, saved: SavedModel, row_tokens: int) -> Callable[[], Live]:
    if engine_kind(options.engine) == "hf":
        return lambda: HfLive(load_decoder(saved, options.max_num_seqs, row_tokens))
    # One home for the engine's settings; what the command does not name has their defaults.
    settings = EngineSettings(max_num_seqs=options.max_num_seqs, dtype=options.dtype, kv_cache_gib=options.kv_cache_gib)
    return lambda: VllmEngine(saved.folder, settings, row_tokens, seed=0).live()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    default = EngineSettings()
    parser = OneLineParser(prog="python -m actors.serve", description="Serve a saved model by OpenAI's interface.")
    add_answer_options(parser)
    parser.add_argument("--name", help="the model's name for clients; by default that of its folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument(
        "--engine", choices=("auto", "vllm", "hf"), default=default.kind, help="auto takes vllm where it is installed"
    )
    parser.add_argument("--max-num-seqs", type=positive, default=32, help="requests decoded at a time; others wait")
    parser.add_argument("--max-model-len", type=positive, help=f"tokens of prompt and answer; by default at most {_ROW_TOKENS}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default.dtype, help="of vllm")
    parser.add_argument("--kv-cache-gib", type=positive, default=default.kv_cache_gib, help="memory of vllm's cache on CPUs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:], sys.stdout, sys.stderr))
