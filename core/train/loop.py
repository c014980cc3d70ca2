"""The training loop: a generator of events that reads from top to bottom.

It owns the order of things (evaluate, step, save) and the numbers a step reports; it sends, prints and publishes nothing. A
reader that stops listening stops the training.
"""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from core.errors import Diverged, Doomed, RunError
from core.eval.rows import Example
from core.events import AdapterWritten, CheckpointWritten, ChildEvent, Ended, Evaluation, PhaseChanged, Started, Step, Warned
from core.run import ANSWERS_FILE, RunInput
from core.states import Phase, Reason
from core.train.build import build_training
from core.train.checkpoint import restore_checkpoint, write_checkpoint
from core.train.device import out_of_memory_named, random_state, set_random_state
from core.train.examine import Examination, examine, prepare_examination, write_answers
from core.train.fused.install import forget_graphs
from core.train.meters import StepClock, memory_gib
from core.train.optim import learning_rate_factor
from core.train.result import write_result
from core.train.training import LaidOut, Training, count_parameters, lay_out, render_example
from core.train.watchdog import say_checkpoint

RESULT_FOLDER = "adapter"
_OVERFLOWS_ALLOWED = 16
"""In a row, in fp16: the loss scale starts at 2^16 and halves each time, so this many mean that it is not the scale."""


def train(run: RunInput, run_dir: Path, should_stop: Callable[[], bool]) -> Iterator[ChildEvent]:
    """Carry out a run in `run_dir`, from its beginning or its checkpoint to the adapter folder.

    `should_stop` is asked between steps; a stop leaves a checkpoint and ends `drained`. Raises RunError kinds for what the
    user can mend, ArtifactError for a checkpoint that is not this run's.
    """
    yield PhaseChanged(phase=Phase.LOADING)
    training = build_training(run)
    done = 0
    if run.resume_from is not None:
        done = restore_checkpoint(training, run.resume_from, spec=run.spec)
    yield from training.warnings
    yield _started(training, run, first_step=done + 1)

    asked = prepare_examination(training, run)
    selection, total = training.selection, training.total_steps
    checkpoints = [done]  # steps that one was written after; a run's beginning counts as one
    evaluation: Evaluation | None = None
    clock = StepClock()

    def last_good(before: int) -> str:
        return say_checkpoint(before, [step for step in checkpoints if step], run.spec.checkpoints.keep)

    with out_of_memory_named(training.device):
        if done == 0 and training.rows.eval_count:
            yield from _evaluation(training, asked, step=0)
        yield PhaseChanged(phase=Phase.TRAINING)
        while done < total and not selection.should_stop:
            if should_stop():
                if checkpoints[-1] != done:
                    yield _checkpoint(training, run, run_dir, step=done)
                yield Ended(reason=Reason.DRAINED, message=f"stopped on request after step {done}", step=done)
                return

            step = done + 1
            clock.start()
            try:
                numbers = yield from _optimizer_step(training, step)
            except Diverged as error:
                raise Diverged(f"step {step}: {error}. {last_good(before=step)}") from error
            seconds = clock.stop()
            # A step of pairs that all share one picture has nothing to tell apart, and says so by its loss.
            if step == 1 and not (training.contrast is not None and numbers.loss == 0):
                _assert_trained(training)
            done = step
            yield Step(
                step=step,
                epoch=training.rows.epochs_at(step),
                loss=numbers.loss,
                learning_rate=numbers.learning_rate,
                grad_norm=numbers.grad_norm,
                tokens=numbers.tokens,
                trained_tokens=numbers.trained_tokens,
                tokens_per_second=numbers.tokens / seconds,
                step_seconds=seconds,
                eta_seconds=clock.eta_seconds(total - step),
                **numbers.curves,
                **memory_gib(training.device),
            )
            try:
                training.watchdog.see(step, numbers.loss, numbers.grad_norm)
            except Doomed as error:
                raise type(error)(f"{error}. {last_good(before=error.since)}", error.since) from error

            every = run.spec.eval.every_steps
            if training.rows.eval_count and (step == total or (every is not None and step % every == 0)):
                evaluation = yield from _evaluation(training, asked, step)
                if step < total and not selection.should_stop:
                    yield PhaseChanged(phase=Phase.TRAINING)
            every = run.spec.checkpoints.every_steps
            if every is not None and step % every == 0:
                yield _checkpoint(training, run, run_dir, step=step)
                checkpoints.append(step)

        if training.rows.eval_count and (evaluation is None or evaluation.step != done):  # resumed after the last step
            evaluation = yield from _evaluation(training, asked, done)
        yield PhaseChanged(phase=Phase.SAVING)
        chosen, eval_loss = done, None if evaluation is None else evaluation.eval_loss
        if selection.keep_best and selection.best is not None:
            chosen, eval_loss = selection.best.step, selection.best.eval_loss
            selection.put_back(training.trainable())
        if run.spec.eval.judge:
            write_answers(training, asked, run_dir / ANSWERS_FILE)
        write_result(training, run, run_dir / RESULT_FOLDER, step=chosen, eval_loss=eval_loss)
    yield AdapterWritten(step=chosen, folder=RESULT_FOLDER)
    message = selection.sentence(done) if done < total else Reason.FINISHED.facts.sentence
    yield Ended(reason=Reason.FINISHED, message=message, step=done)


@dataclass(frozen=True)
class _StepNumbers:
    loss: float  # mean over the step's terms
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    curves: dict[str, float]


def _optimizer_step(training: Training, step: int) -> Generator[Warned, None, _StepNumbers]:
    """One step over all its micro-batches. Yields a warning for each try that overflowed fp16 or the GPU's memory."""
    rate = training.learning_rate * learning_rate_factor(training.schedule, step, training.total_steps)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    parameters = [parameter for _, parameter in training.trainable()]
    for _ in range(_OVERFLOWS_ALLOWED):
        examples, found = yield from _gradients(training, step)
        norm = training.accelerator.clip_grad_norm_(parameters, training.max_grad_norm)
        training.optimizer.step()
        _lay_ahead(training, step + 1)
        # The step's only question to the GPU, when all it has to do has been said. Of weights that a gradient without bounds has
        # been added to nothing is kept: the run ends.
        loss, grad_norm, *curves = torch.stack([found.loss, norm, *found.curves.values()]).tolist()
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss}")
        if not math.isfinite(grad_norm) and training.accelerator.scaler is None:
            raise Diverged(f"the gradient's norm is {grad_norm} (loss {loss:.4f})")
        if math.isfinite(grad_norm):
            tokens = sum(example.tokens for example in examples)
            trained = sum(example.trained_tokens for example in examples)
            return _StepNumbers(loss, rate, grad_norm, tokens, trained, dict(zip(found.curves, curves, strict=True)))
        # The scaler left the weights alone and halved its scale: the same rows are tried again, none is lost.
        yield Warned(code="gradient_overflow", message=f"step {step}: fp16 gradients overflowed; tried again, smaller scale")
    raise Diverged(f"fp16 gradients overflowed {_OVERFLOWS_ALLOWED} times in a row")


class _Accumulated(NamedTuple):
    """Numbers of a step that are still on their way: fp64 scalars on the device."""

    loss: torch.Tensor
    curves: dict[str, torch.Tensor]


def _lay_ahead(training: Training, step: int) -> None:
    """While the GPU has work to do. Not pairs: their pixels would take twice the memory."""
    is_there = training.ahead is not None and training.ahead.step == step
    if step <= training.total_steps and training.contrast is None and not is_there:
        training.ahead = lay_out(training, step)


def _gradients(training: Training, step: int) -> Generator[Warned, None, tuple[list[Example], _Accumulated]]:
    """Forward and backward over a step: (its examples, its numbers). Once in a run it may halve what is in memory and begin
    anew."""
    chance = random_state(training.device)
    laid: LaidOut | None
    while True:
        try:
            ahead = training.ahead
            laid = ahead if ahead is not None and ahead.step == step else lay_out(training, step)
            return laid.examples, _accumulate(training, laid)
        except torch.OutOfMemoryError:
            smaller = training.layout.halved(training.rows.step_rows(step))
            if training.has_halved or smaller is None:
                raise
        # Outside the except block: the traceback holds the tensors of the pass that did not fit.
        training.has_halved = True
        message = f"step {step}: the GPU's memory was too small for {training.layout}; the step is done again with {smaller}"
        training.layout, training.ahead, laid = smaller, None, None
        training.optimizer.zero_grad()
        if training.choice.tier == "fused":
            forget_graphs(training.model)  # whose memory is nobody else's
        if training.device.type == "cuda":
            torch.cuda.empty_cache()
        set_random_state(chance, training.device)
        yield Warned(code="micro_batch_halved", message=message)


def _accumulate(training: Training, laid: LaidOut) -> _Accumulated:
    if training.contrast is not None:
        training.optimizer.zero_grad()
        with training.adapters_uncast():
            return _Accumulated(
                *training.contrast.backward(
                    training.model, laid.batches, compute=training.compute, backward=training.accelerator.backward
                )
            )
    terms = training.kind.terms(laid.examples)
    total = torch.zeros((), dtype=torch.float64, device=training.device)
    curves: dict[str, torch.Tensor] = {}
    training.optimizer.zero_grad()
    # Fused layers don't go through peft's forward, and to tell all of its modules takes the host milliseconds.
    with nullcontext() if training.choice.tier == "fused" else training.adapters_uncast():
        for batch in laid.batches:
            with training.compute():
                found = training.loss(training.model, batch)
            summed = found.sums.sum()
            training.accelerator.backward(summed / terms)
            total += summed.detach()
            for name, values in found.curves.items():
                curves[name] = curves.get(name, 0) + values.double().sum()
    return _Accumulated(total / terms, {name: value / len(laid.examples) for name, value in curves.items()})


def _assert_trained(training: Training) -> None:
    # Frozen inputs, a re-entrant recomputation or an unused module leave adapters without a gradient, and all else looks fine.
    idle = [name for name, p in training.trainable() if p.grad is None]
    moved = any(p.grad is not None and bool(p.grad.any()) for _, p in training.trainable())
    if idle or not moved:
        what = f"{len(idle)} parameters, {idle[0]} among them, are" if idle else "every parameter is"
        raise RunError(f"after the first step {what} without a gradient: this model would not be trained")


def _evaluation(training: Training, asked: Examination, step: int) -> Generator[ChildEvent, None, Evaluation]:
    yield PhaseChanged(phase=Phase.EVALUATING)
    evaluation = yield from examine(training, asked, step)
    verdict = training.selection.judge(step, evaluation)
    if training.selection.keep_best and verdict.is_best:
        training.selection.remember(training.trainable())
    return evaluation


def _checkpoint(training: Training, run: RunInput, run_dir: Path, *, step: int) -> CheckpointWritten:
    folder = f"checkpoints/step-{step}"
    write_checkpoint(training, run_dir / folder, step=step, job_id=run.job_id, spec=run.spec)
    return CheckpointWritten(step=step, folder=folder)


def _started(training: Training, run: RunInput, first_step: int) -> Started:
    trainable, total = count_parameters(training.model)
    return Started(
        device=torch.cuda.get_device_name(training.device) if training.device.type == "cuda" else "cpu",
        precision=training.base.compute_dtype,
        total_steps=training.total_steps,
        first_step=first_step,
        train_rows=training.rows.train_rows,
        eval_rows=training.rows.eval_count,
        tier=training.choice.tier,
        tier_reason=training.choice.reason,
        trainable_parameters=trainable,
        total_parameters=total,
        example=render_example(training.tokenizer, training.rows),
    )
