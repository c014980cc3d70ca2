"""The training loop: a generator of events that reads from top to bottom.

It owns the order of things (evaluate, step, save) and the numbers a step reports; it sends, prints and publishes nothing. A
reader that stops listening stops the training.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import Diverged, RunError
from core.eval.evaluate import evaluate_rows
from core.eval.rows import collate
from core.events import AdapterWritten, CheckpointWritten, ChildEvent, Ended, Evaluation, PhaseChanged, Started, Step, Warned
from core.run import RunInput
from core.states import Phase, Reason
from core.train.build import Training, build_training, count_parameters, render_example
from core.train.checkpoint import restore_checkpoint, write_checkpoint
from core.train.device import out_of_memory_named
from core.train.meters import StepClock, memory_gib
from core.train.optim import learning_rate_factor
from core.train.result import write_result

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
    spec_digest = hashlib.sha256(run.spec.model_dump_json().encode()).hexdigest()
    done = 0
    if run.resume_from is not None:
        done = restore_checkpoint(training, run.resume_from, spec_digest=spec_digest)
    yield from training.warnings
    yield _started(training, run, first_step=done + 1)

    saved = done  # a checkpoint holds this step, or it is the beginning
    total = training.total_steps
    evaluation: Evaluation | None = None
    clock = StepClock()
    with out_of_memory_named(training.device):
        if done == 0 and training.rows.eval_rows:
            yield PhaseChanged(phase=Phase.EVALUATING)
            yield _evaluation(training, step=0)
        yield PhaseChanged(phase=Phase.TRAINING)
        while done < total:
            if should_stop():
                if saved != done:
                    yield _checkpoint(training, run, run_dir, step=done, spec_digest=spec_digest)
                yield Ended(reason=Reason.DRAINED, message=f"stopped on request after step {done}", step=done)
                return

            step = done + 1
            clock.start()
            try:
                numbers = yield from _optimizer_step(training, step)
            except Diverged as error:
                raise Diverged(f"step {step}: {error}") from error
            seconds = clock.stop()
            if step == 1:
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
                **memory_gib(training.device),
            )

            every = run.spec.eval.every_steps
            if training.rows.eval_rows and (step == total or (every is not None and step % every == 0)):
                yield PhaseChanged(phase=Phase.EVALUATING)
                evaluation = _evaluation(training, step)
                yield evaluation
                if step < total:
                    yield PhaseChanged(phase=Phase.TRAINING)
            every = run.spec.checkpoints.every_steps
            if every is not None and step % every == 0:
                yield _checkpoint(training, run, run_dir, step=step, spec_digest=spec_digest)
                saved = step

        if training.rows.eval_rows and evaluation is None:  # resumed after the last step
            yield PhaseChanged(phase=Phase.EVALUATING)
            evaluation = _evaluation(training, step=total)
            yield evaluation
        yield PhaseChanged(phase=Phase.SAVING)
        eval_loss = None if evaluation is None else evaluation.eval_loss
        write_result(training, run, run_dir / RESULT_FOLDER, step=total, eval_loss=eval_loss)
    yield AdapterWritten(step=total, folder=RESULT_FOLDER)
    yield Ended(reason=Reason.FINISHED, message=Reason.FINISHED.facts.sentence, step=total)


@dataclass(frozen=True)
class _StepNumbers:
    loss: float  # mean nats per trained token
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int


def _optimizer_step(training: Training, step: int) -> Generator[Warned, None, _StepNumbers]:
    """One step over all its micro-batches. Yields a warning for each try that overflowed fp16."""
    batches = [collate(rows, training.device) for rows in training.rows.step_rows(step)]
    trained_tokens = sum(batch.trained_tokens for batch in batches)
    rate = training.learning_rate * learning_rate_factor(training.schedule, step, training.total_steps)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    parameters = [parameter for _, parameter in training.trainable()]
    for _ in range(_OVERFLOWS_ALLOWED):
        training.optimizer.zero_grad()
        nats = torch.zeros((), dtype=torch.float64, device=training.device)
        with training.adapters_uncast():
            for batch in batches:
                with training.compute():
                    summed, _ = training.loss(training.model, batch)
                training.accelerator.backward(summed / trained_tokens)
                nats += summed.detach()
        loss = nats.item() / trained_tokens
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss}")
        grad_norm = float(training.accelerator.clip_grad_norm_(parameters, training.max_grad_norm))
        if not math.isfinite(grad_norm) and training.accelerator.scaler is None:
            raise Diverged(f"the gradient's norm is {grad_norm} (loss {loss:.4f})")
        training.optimizer.step()
        if math.isfinite(grad_norm):
            return _StepNumbers(loss, rate, grad_norm, sum(batch.tokens for batch in batches), trained_tokens)
        # The scaler left the weights alone and halved its scale: the same rows are tried again, none is lost.
        yield Warned(code="gradient_overflow", message=f"step {step}: fp16 gradients overflowed; tried again, smaller scale")
    raise Diverged(f"fp16 gradients overflowed {_OVERFLOWS_ALLOWED} times in a row")


def _assert_trained(training: Training) -> None:
    # Frozen inputs, a re-entrant recomputation or an unused module leave adapters without a gradient, and all else looks fine.
    idle = [name for name, p in training.trainable() if p.grad is None]
    moved = any(p.grad is not None and bool(p.grad.any()) for _, p in training.trainable())
    if idle or not moved:
        what = f"{len(idle)} parameters, {idle[0]} among them, are" if idle else "every parameter is"
        raise RunError(f"after the first step {what} without a gradient: this model would not be trained")


def _evaluation(training: Training, step: int) -> Evaluation:
    with training.adapters_uncast():
        row_losses = evaluate_rows(
            training.model,
            training.rows.eval_rows,
            micro_batch_size=training.micro_batch_size,
            device=training.device,
            compute=training.compute,
        )
    tokens = sum(count for _, count in row_losses)
    loss = sum(nats for nats, _ in row_losses) / tokens
    if not math.isfinite(loss):
        raise Diverged(f"the held-out loss after step {step} is {loss}")
    return Evaluation(
        step=step,
        eval_loss=loss,
        eval_perplexity=math.exp(min(loss, 700.0)),  # e^710 is no float
        eval_trained_tokens=tokens,
        row_losses=row_losses,
    )


def _checkpoint(training: Training, run: RunInput, run_dir: Path, *, step: int, spec_digest: str) -> CheckpointWritten:
    folder = f"checkpoints/step-{step}"
    write_checkpoint(training, run_dir / folder, step=step, job_id=run.job_id, spec_digest=spec_digest)
    return CheckpointWritten(step=step, folder=folder)


def _started(training: Training, run: RunInput, first_step: int) -> Started:
    trainable, total = count_parameters(training.model)
    return Started(
        device=torch.cuda.get_device_name(training.device) if training.device.type == "cuda" else "cpu",
        precision=training.base.compute_dtype,
        total_steps=training.total_steps,
        first_step=first_step,
        train_rows=training.rows.train_rows,
        eval_rows=len(training.rows.eval_rows),
        trainable_parameters=trainable,
        total_parameters=total,
        example=render_example(run, training.rows),
    )
