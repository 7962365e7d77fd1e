"""One training run on one rank, from the configuration to the exported model."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.distributed as dist

from dist_lowrank.checkpoint.folders import newest_line
from dist_lowrank.config import ConfigError, RunConfig, RunFolder
from dist_lowrank.exit_codes import ExitCode, NotFinite
from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.console import Console, quantity
from dist_lowrank.telemetry.dashboard import Dashboard, writes_event_files
from dist_lowrank.telemetry.hparams import hyperparameters, write_final
from dist_lowrank.telemetry.memory import bytes_by_cause, state_tensors
from dist_lowrank.telemetry.memory_tracker import MemoryTracker
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.telemetry.profiling import Profiler, memory_watched
from dist_lowrank.telemetry.throughput import StepTimer, model_flops_per_token, peak_flops_per_second
from dist_lowrank.training.checkpoints import Checkpoints, Progress
from dist_lowrank.training.data import load_data
from dist_lowrank.training.evaluate import evaluate, next_token_loss, target_count
from dist_lowrank.training.export import export_model, sample_text
from dist_lowrank.training.model import blocks, build_model, data_with_tokenizer, family, route
from dist_lowrank.training.numerics import LossSpikes, SkippedInARow, check_not_mostly_skipped
from dist_lowrank.training.optimizers import make_schedule
from dist_lowrank.training.parameter_table import as_markdown, parameter_table
from dist_lowrank.training.position import Position
from dist_lowrank.training.stop import StopReason, seconds_since_launch, stop_requests
from dist_lowrank.training.strategy import make_strategy


def train(
    config: RunConfig,
    folder: RunFolder,
    device: torch.device,
    watch: Callable[[Position], AbstractContextManager[object]] | None = None,
) -> ExitCode:
    """Trains to the end, or until someone or the clock asks it to stop. Collective over the default process group.

    Args:
        watch: makes what is entered while steps are made, such as a watchdog.

    Returns:
        How it ended: finished, or stopped after a step with everything written.

    Raises:
        ConfigError: what cannot be built from this configuration.
        NotFinite: loss or gradients were not finite too often.
    """
    torch.manual_seed(config.seed)
    random.seed(config.seed)  # of other libraries, so that a run that starts again before it saved is the same
    numpy.random.seed(config.seed % 2**32)
    torch.use_deterministic_algorithms(config.train.deterministic)
    rank = dist.get_rank()
    shown = writes_event_files(config.telemetry, rank, dist.get_world_size())
    tensorboard = folder.tensorboard(rank) if shown else None
    console = Console(enabled=rank == 0, interval=config.telemetry.console_interval)
    requests = stop_requests(_seconds_until_limit(config))
    memory = memory_watched(folder.traces, rank, device, history=config.telemetry.memory_history)
    with requests as stop, console, MetricsWriter(folder.metrics(rank), tensorboard) as metrics, memory:
        trainer = Trainer(config, folder, device, console, metrics)
        return trainer.run(stop, watch(trainer.position) if watch else nullcontext())


def _seconds_until_limit(config: RunConfig) -> float | None:
    if config.train.time_limit_minutes is None:
        return None
    return 60 * (config.train.time_limit_minutes - config.train.time_limit_lead_minutes) - seconds_since_launch()


@dataclass(frozen=True)
class _Asked:
    """What any rank wants after a step, the same on all ranks but for the name of the reason."""

    stop: StopReason | None
    save: bool


class Trainer:
    """The state of a run: data, model, optimizer, schedule, counters."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, device: torch.device, console: Console, metrics: MetricsWriter
    ) -> None:
        self.config, self.folder, self.device, self.console, self.metrics = config, folder, device, console, metrics
        self.world_size = dist.get_world_size()
        try:
            self.data = load_data(
                data_with_tokenizer(config),
                seed=config.seed,
                rank=dist.get_rank(),
                world_size=self.world_size,
                global_batch_size=config.train.global_batch_size,
                micro_batch_size=config.train.micro_batch_size,
            )
        except (ValueError, ConnectionError) as error:
            raise ConfigError(str(error)) from error
        model = build_model(config).to(device)
        self.model_configuration = model.config
        self.flops_per_token = model_flops_per_token(model, config.data.sequence_length)
        self._announce(model, route(model, config))
        if config.model.compile:
            for block in blocks(model):
                block.compile()
        self.strategy = make_strategy(config, model, device)
        self.optimizer = self.strategy.optimizer
        self.schedule = make_schedule(self.optimizer, config.schedule, config.train.steps)
        self.timer = StepTimer(device)
        self._time_optimizer()
        projected = config.strategy.low_rank_gradients
        self._norm_tag = tags.GRADIENT_NORM_PROJECTED if projected else tags.GRADIENT_NORM
        self.dashboard = Dashboard(config.telemetry, metrics, device)
        rank = dist.get_rank()
        demand = folder.trace_demand if rank == 0 else None
        self.profiler = Profiler(folder.traces, rank, device, config.telemetry.profile_steps, demand)
        self.position = Position()
        self.skipped_in_a_row = SkippedInARow(config.train.max_skipped_steps)
        self.spikes = LossSpikes()
        self.progress = Progress()
        self.checkpoints = Checkpoints(
            config, folder, self.strategy.state(), self.schedule, self.data.train, device, console, self.progress
        )

    def _time_optimizer(self) -> None:
        """By hooks, because DeepSpeed calls the optimizer, and more than once per step."""
        running = ExitStack()
        self.optimizer.register_step_pre_hook(lambda *_: running.enter_context(self.timer.optimizer()))
        self.optimizer.register_step_post_hook(lambda *_: running.close())

    def _announce(self, model: torch.nn.Module, groups: list[dict[str, Any]]) -> None:
        path = "low-rank" if hasattr(self.config.optimizer, "rank") else "matrices"
        for group in groups:
            parameters = [p for _, p in group["params"]]
            families = dict.fromkeys(family(name) for name, _ in group["params"])
            self.console.line(
                f"{path if group.get('low_rank', True) else 'dense'}: {len(parameters)} parameters, "
                f"{quantity(sum(p.numel() for p in parameters))} elements: {', '.join(families)}"
            )
        if self.config.strategy.low_rank_gradients:
            self.console.line(
                "ranks sum coefficients of gradients where directions are known; clip_norm is of what they span"
            )
        if self.data.unigram_loss is not None:
            self.console.line(f"unigram model: validation loss {self.data.unigram_loss:.4f}")

    def run(self, stop: list[StopReason], watch: AbstractContextManager[object] | None = None) -> ExitCode:
        """Trains from where it is; see `train`."""
        steps = self.config.train.steps
        self.console.start(steps)
        self._describe()
        done = self.checkpoints.resume()
        if done == 0:
            self._evaluate(0)
            self.progress.first_validation_loss = self.progress.validation_loss
        self.timer = StepTimer(self.device)
        with watch or nullcontext():
            for step in range(done + 1, steps + 1):
                try:
                    with self.profiler.traced(step), self._memory_tracked(step):
                        asked = self._step(step, stop)
                except NotFinite:  # on all ranks
                    self.checkpoints.close()
                    raise
                last = step == steps
                if asked.stop and not last:
                    return self._stop(step, asked.stop)
                if step % self.config.train.eval_interval == 0 or last:
                    self._evaluate(step)
                if self.checkpoints.is_due(step, by_clock=asked.save, last=last):
                    self._save(step)
            self.checkpoints.close()
        self.console.close()
        if self.config.checkpoint.at_end:
            self.checkpoints.check_saved(steps)
        check_not_mostly_skipped(self.progress.skipped_steps, steps)
        self._finish(steps)
        return ExitCode.FINISHED

    @contextmanager
    def _memory_tracked(self, step: int) -> Iterator[None]:
        """Logs what the step held at its peak, if it is one of those that should tell."""
        if step not in self.config.telemetry.memory_tracker_steps:
            yield
            return
        with MemoryTracker(self.strategy.model, self.optimizer, self._held, self.device) as tracker:
            yield
        memory = tracker.told()
        values = {tags.memory_bytes(cause): most for cause, most in memory.most.items()}
        values |= {tags.memory_at_peak_bytes(cause): held for cause, held in memory.at_peak.items()}
        self.dashboard.log(step, values | {tags.memory_at_peak_bytes("total"): memory.total_bytes})

    def _held(self) -> dict[str, list[torch.Tensor]]:
        of_checkpoints = {"checkpoint_copy": self.checkpoints.saver.copies}
        return {**self.strategy.tensors(), **state_tensors(self.optimizer), **of_checkpoints}

    def _describe(self) -> None:
        """In TensorBoard's text tab."""
        if dist.get_rank() == 0 and self.metrics.shows_events:
            self.metrics.text("run/parameters", as_markdown(parameter_table(self.config, self.world_size)))
            configuration = json.loads((self.folder.attempt_path / "run.json").read_text())["config"]
            self.metrics.text("run/configuration", f"```json\n{json.dumps(configuration, indent=2)}\n```")

    def _save(self, step: int) -> None:
        self.position.enter("save", step)
        with self.timer.paused():
            self.checkpoints.save(step)

    def _stop(self, step: int, reason: StopReason) -> ExitCode:
        """Ends an unfinished run in good order."""
        self.profiler.close(step)
        if self.config.checkpoint.at_end:
            self._save(step)
        self.checkpoints.close()
        self.console.close()
        code = ExitCode.REQUEUE if self.checkpoints.is_saved(step) else ExitCode.TERMINATED
        if reason is StopReason.INTERRUPT:
            code = ExitCode.INTERRUPTED
        if dist.get_rank() == 0:
            self.folder.mark_stopped({"exit_code": code, "reason": reason.value, "step": step})
        self.console.line(f"stopped after step {step} by {reason.value}; run folder {self.folder.attempt_path}")
        self.console.line(newest_line(self.folder.checkpoints))
        return code

    def _step(self, step: int, stop: list[StopReason]) -> _Asked:
        """One optimizer step."""
        config = self.config
        loss = self._forward_backward(step)
        norm = self.strategy.prepare()
        self.position.enter("step")
        # One sum tells all ranks the same: the mean loss, whether anything is not finite, whether to stop or to save.
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        flags = [StopReason.INTERRUPT in stop, bool(stop), self.checkpoints.due_by_clock, self.profiler.is_demanded()]
        asked = torch.tensor(flags, dtype=torch.float64, device=self.device)
        vote = torch.cat([torch.stack([loss.double(), bad.double()]), asked])
        dist.all_reduce(vote)
        mean_loss, bad_ranks, interrupts, requests, saving, tracing = vote.tolist()
        if tracing:
            self.profiler.demand_after(step)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        due = step % config.telemetry.log_interval == 0 or step == config.train.steps
        memory = bytes_by_cause(self.strategy.tensors(), self.optimizer) if due else {}
        updated = self.strategy.step(skip=bool(bad_ranks))
        if not updated:
            self.progress.skipped_steps += 1
            self.console.line(f"step {step}: loss or gradient is not finite; update skipped")
        self._flag_spike(step, mean_loss / self.world_size)
        self.skipped_in_a_row.note(step, not updated)
        self.schedule.step()  # also after a skipped update: the schedule follows the data
        self.timer.end_step(config.train.global_batch_size * config.data.sequence_length)
        if due:
            self._log(step, mean_loss / self.world_size, learning_rate, memory)
        reason = (stop[0] if stop else StopReason.OTHER_RANK) if requests else None
        return _Asked(StopReason.INTERRUPT if interrupts else reason, bool(saving))

    def _flag_spike(self, step: int, loss: float) -> None:
        median = self.spikes.median_if_spike(loss)
        if median is not None:
            self.metrics.log(step, {tags.LOSS_SPIKE: loss})
            self.console.line(f"step {step}: loss {loss:.4f} is a spike, the median of the last steps is {median:.4f}")

    def _forward_backward(self, step: int) -> torch.Tensor:
        """Accumulates the gradient of this rank's part of the batch; returns its mean loss, (), nats per token."""
        batches = self.data.train.next_batch()
        targets = self._targets_per_rank(batches)
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            share, batch = target_count(batch) / targets, batch.to(self.device, non_blocking=True)
            self.position.enter("forward", step)
            with self.strategy.forward():
                loss = next_token_loss(self.strategy.model, batch) * share
            self.position.enter("backward")
            self.strategy.backward(loss, last=index == len(batches) - 1)
            total = total + loss.detach()
        return total

    def _targets_per_rank(self, batches: list[torch.Tensor]) -> float:
        """Mean number of targets of a rank in this step, so that every token of the global batch counts alike."""
        own = sum(map(target_count, batches))
        if getattr(self.config.data, "packing", True):
            return own  # the same everywhere
        total = torch.tensor(own, device=self.device)
        dist.all_reduce(total)
        return int(total) / self.world_size

    def _log(self, step: int, loss: float, learning_rate: float, memory: dict[str, int]) -> None:
        times = self.timer.read()
        values: dict[str, float] = {
            tags.LOSS_TRAIN: loss,
            tags.LEARNING_RATE: float(learning_rate),
            self._norm_tag: self.strategy.gradient_norm,
            tags.TOKENS_PER_SECOND: times.tokens_per_second,
            tags.OPTIMIZER_MILLISECONDS: times.optimizer_milliseconds,
            tags.OPTIMIZER_SHARE: times.optimizer_share,
        }
        flops_per_second = mfu = None
        if self.flops_per_token is not None:
            flops_per_second = values[tags.MODEL_FLOPS_PER_SECOND] = self.flops_per_token * times.tokens_per_second
        if flops_per_second is not None and self.device.type == "cuda":
            dtype = "bf16" if self.config.precision.name in ("bf16", "bf16_weights") else "fp32"
            peak = peak_flops_per_second(torch.cuda.get_device_name(self.device), dtype)
            if peak is not None:
                mfu = values[tags.MFU] = flops_per_second / (peak * self.world_size)
        captured: dict[str, float] = getattr(self.optimizer, "captured_energy", dict)()
        for name in dict.fromkeys(map(family, captured)):
            values[tags.captured_energy(name)] = statistics.fmean(
                share for matrix, share in captured.items() if family(matrix) == name
            )
        values |= {tags.memory_bytes(cause): count for cause, count in memory.items()}
        self.dashboard.log(step, values)
        self.console.step(
            step,
            loss=loss,
            learning_rate=learning_rate,
            tokens_per_second=times.tokens_per_second,
            flops_per_second=flops_per_second,
            mfu=mfu,
            optimizer_share=times.optimizer_share,
            eta_seconds=times.seconds_per_step * (self.config.train.steps - step),
        )

    def _evaluate(self, step: int) -> None:
        config = self.config
        self.position.enter("evaluate", step)
        with self.timer.paused():
            self.progress.validation_loss = loss = evaluate(
                self.strategy.model,
                self.data.validation,
                limit=config.train.eval_sequences,
                micro_batch_size=config.train.micro_batch_size,
                device=self.device,
                context=self._evaluation_forward,
                legacy_counter=config.train.eval_legacy_counter,
            )
            self.strategy.after_evaluation()
        perplexity = math.exp(min(loss, 700.0))
        self.metrics.log(step, {tags.LOSS_VALIDATION: loss, tags.PERPLEXITY_VALIDATION: perplexity})
        self.console.validation(step, loss, perplexity)

    def _evaluation_forward(self) -> Any:
        self.position.enter("evaluate")  # each forward pass is progress
        return self.strategy.forward()

    def _finish(self, step: int) -> None:
        config, line = self.config, self.console.line
        self.profiler.close(step)
        figures = self.dashboard.final_figures()
        if config.train.export:
            weights = self.strategy.whole_weights()
            if dist.get_rank() == 0:
                whole = export_model(weights, self.model_configuration, self.data.tokenizer, self.folder.export)
                if config.train.sample_tokens:
                    line(f"sample: {sample_text(whole, self.data.tokenizer, config.train.sample_tokens, config.seed)}")
        if dist.get_rank() == 0:
            self.folder.mark_finished(
                {
                    "steps": step,
                    "skipped_steps": self.progress.skipped_steps,
                    "tokens": step * config.train.global_batch_size * config.data.sequence_length,
                    "first_validation_loss": self.progress.first_validation_loss,
                    "validation_loss": self.progress.validation_loss,
                    "unigram_loss": self.data.unigram_loss,
                    **figures,
                }
            )
            if self.metrics.shows_events:
                figures = {"validation_loss": self.progress.validation_loss, **figures}
                chosen = hyperparameters(config, self.world_size)
                write_final(self.folder.tensorboard_final, chosen, figures, step)
        line(f"validation loss {self.progress.first_validation_loss:.4f} -> {self.progress.validation_loss:.4f}")
        line(f"run folder {self.folder.path}")
        if config.train.export:
            line(f"model      {self.folder.export} (transformers: AutoModelForCausalLM.from_pretrained)")
        if config.telemetry.tensorboard:
            line(f"curves     tensorboard --logdir {self.folder.attempt_path / 'tensorboard'}")
