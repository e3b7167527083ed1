"""`python -m actors.lm_eval ARGUMENTS`: the harness's own command line, which then knows the model `retract` and our tasks.

It imports no outside modules itself, so the class is registered here before it takes over.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from pipeline.arguments import USAGE
from pipeline.tasks.problem import TaskError

_INTERRUPTED = 130


def main(arguments: Sequence[str], err: TextIO) -> int:
    """Exit code: 0; 2 for what cannot be evaluated, 130 when interrupted. What the harness fails with is left to it."""
    if importlib.util.find_spec("lm_eval") is None:
        err.write("error: lm-evaluation-harness is not installed: pip install 'lm_eval==0.4.*' (extra lm-eval)\n")
        return USAGE
    from lm_eval.__main__ import cli_evaluate

    import actors.lm_eval.model  # noqa: F401  # registers itself
    from actors.saved import InputError

    given = list(arguments)
    if len(given) > 1 and not any(one.partition("=")[0] == "--include_path" for one in given):
        given += ["--include_path", str(Path(__file__).parent)]
    sys.argv[1:] = given
    try:
        cli_evaluate()
    except (InputError, TaskError) as error:
        err.write(f"error: {error}\n")
        return USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stderr))
