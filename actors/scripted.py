"""An engine without a model, for tests of the machinery: it writes the gold solutions of a dataset of problems, half of them with a
wrong digit and a wrong answer, each drawn from its prompt and its seed alone: what it answers depends neither on weights nor on the
batch.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import load_from_disk
from transformers import AutoTokenizer

from actors.engines import Completion, Request, Sampling
from actors.modelless import Modelless

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_RIGHT = 0.5  # share of the solutions that stay as they are
_ENOUGH = 20  # ids of text that belongs to no problem


class ScriptedEngine(Modelless):
    """Knows the problems of the dataset folder `script`, asked as in `{question}\\n`."""

    kind = "scripted"

    def __init__(self, folder: Path, script: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = load_from_disk(str(script))
        self._solutions = {
            question: _ANNOTATION.sub("", solution) for question, solution in zip(rows["question"], rows["solution"], strict=True)
        }

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Notes the seeds of what it has made on the standard output, which actors have in a log."""
        made = [self._completion(one.prompt_ids, one.seed, sampling) for one in requests]
        print("made", [one.seed for one in requests], flush=True)
        return made

    def _completion(self, prompt_ids: Sequence[int], seed: int, sampling: Sampling) -> Completion:
        chance = random.Random(json.dumps([list(prompt_ids), None if sampling.temperature == 0 else seed]))
        question, _, written = str(self._tokenizer.decode(list(prompt_ids))).partition("\n")
        solution = self._solutions.get(question, "")
        rest = solution[len(written) :] if solution.startswith(written) else ""
        if not rest:
            rest = "".join(chance.choices("0123456789\n", k=_ENOUGH))
        digits = [at for at, character in enumerate(rest) if character.isdigit()]
        if digits and chance.random() > _RIGHT:
            for at in {chance.choice(digits), digits[-1]}:  # the answer is wrong where a step is
                rest = rest[:at] + str((int(rest[at]) + chance.randint(1, 9)) % 10) + rest[at + 1 :]
        ids = [*self._tokenizer(rest, add_special_tokens=False, split_special_tokens=True).input_ids, sampling.stop_id]
        ids = ids[: sampling.max_tokens]
        stops = (sampling.stop_id, *sampling.also_stop)
        end = next((at + 1 for at, token in enumerate(ids) if token in stops), len(ids))
        ids = ids[:end]
        logprobs = tuple(-round(chance.random(), 6) for _ in ids)
        top = tuple(((token, logprob),) for token, logprob in zip(ids, logprobs, strict=True)) if sampling.top else ()
        return Completion(tuple(ids), logprobs if sampling.logprobs else (), "stop" if ids[-1] in stops else "length", top)
