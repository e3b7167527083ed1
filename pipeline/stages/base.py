"""Stage `base`: the model to start from, with the undo token added. Trained from scratch here, or loaded from hub or folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.learner import Curve, DevCheck
from actors.packing import TrainingSet
from actors.workers import curve_json
from pipeline.backtrack.embedding import add_undo_token
from pipeline.backtrack.trace import Trace, build_trace
from pipeline.config import BaseSettings, ScratchModel, Settings
from pipeline.stages.io import Codec, read_problems, write_json
from pipeline.stages.stage import Context, StageError
from pipeline.tasks.problem import Problem
from verifiers.tasks import judge_of

PAD, STOP = "<|pad|>", "<|end|>"


def run(context: Context) -> None:
    settings = context.settings
    if settings.base.model == "scratch":
        _from_scratch(context)
    else:
        model, tokenizer = _load(settings.base)
        _finish(model, tokenizer, settings, context.out)
        context.counts["parameters"] = model.num_parameters()


def _from_scratch(context: Context) -> None:
    settings = context.settings
    train = settings.base.train
    problems = read_problems(context.inputs["problems"])
    learn = [problem for problem in problems if problem.split == "train"]
    dev = [problem for problem in problems if problem.split == "dev"]
    texts = [f"{settings.base.prompt.format(question=problem.question)}{problem.solution}" for problem in learn]
    tokenizer = train_tokenizer(texts, settings.base.scratch.vocab)
    without_undo = copy.deepcopy(tokenizer)
    model = new_model(settings.base.scratch, tokenizer, settings.run.seed)
    start = context.scratch / "untrained"
    _finish(model, tokenizer, settings, start)
    codec = Codec(start, settings.undo, settings.base.prompt)
    checked = dev[:: max(1, len(dev) // train.check_problems)][: train.check_problems]
    longest = max(len(codec.solution_ids(problem.solution)) for problem in dev)
    check = DevCheck(
        prompts=tuple(codec.prompt_ids(problem) for problem in checked),
        is_right=lambda index, text: judge_of(checked[index]).correct(checked[index], text),
        max_tokens=longest + 16,
    )
    traces = [clean_trace(codec, problem) for problem in learn]
    added_last = settings.base.scratch.undo_added == "last"
    trained = context.scratch / "trained" if added_last else context.out
    with context.terminal.stage("base", train.steps, "steps") as progress, context.workers.watch("base", 0) as watch:

        def show(curve: Curve) -> None:
            watch.curve(curve)
            progress.update(curve.step, _note(curve.losses, curve.checks))

        curve = context.workers.fit(
            start,
            trained,
            TrainingSet(traces, codec.rule),
            train,
            settings.run.seed,
            show,
            check,
            context.resume,
        )
        show(curve)
    if added_last:
        _finish(AutoModelForCausalLM.from_pretrained(trained), without_undo, settings, context.out)
    if curve.left_out:
        context.terminal.warn(f"base: {curve.left_out} problems are longer than base.train.row_tokens and were left out")
    write_json(curve_json(curve), context.out / "curve.json")
    context.counts.update(parameters=model.num_parameters(), steps=curve.step, tokens=curve.tokens)


def _note(losses: list[tuple[int, float]], checks: list[tuple[int, float]]) -> str:
    loss = f"loss {losses[-1][1]:.3f}" if losses else ""
    return loss + (f", dev accuracy {checks[-1][1]:.3f}" if checks else "")


def clean_trace(codec: Codec, problem: Problem) -> Trace:
    """Question and gold solution, without errors."""
    return build_trace(codec.prompt_ids(problem), codec.solution_ids(problem.solution), (), codec.rule)


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits: numbers that the model has not seen are made of parts that it has."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[PAD, STOP], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=STOP)


def new_model(settings: ScratchModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of the given size with random weights and spare embedding rows up to a multiple of 64."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) // 64 * 64 + 64,
            hidden_size=settings.width,
            intermediate_size=settings.width * 8 // 3 // 16 * 16,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.context,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _load(settings: BaseSettings) -> tuple[Any, Any]:
    """A model and its tokenizer from the hub or a folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, trust_remote_code=settings.trust_remote_code, use_safetensors=True, dtype="auto"
        )
    except (OSError, ValueError) as error:
        raise StageError(f"base.model: cannot load {settings.model!r}: {' '.join(str(error).split())[:300]}") from error
    if tokenizer.eos_token_id is None:
        raise StageError(f"base.model: the tokenizer of {settings.model!r} has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _finish(model: Any, tokenizer: Any, settings: Settings, folder: Path) -> None:
    """Add the undo token and save an ordinary Hugging Face folder."""
    undo = settings.undo
    try:
        add_undo_token(model, tokenizer, undo.token, undo.init, undo.words, undo.description, undo.noise, settings.run.seed)
    except ValueError as error:
        raise StageError(f"undo: {error}") from error
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
