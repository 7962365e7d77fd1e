"""One training run on one rank, from the configuration to the exported model."""

from __future__ import annotations

import math
import signal
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dist_lowrank.config import ConfigError, RunConfig, RunFolder
from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.console import Console, quantity
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.telemetry.throughput import StepTimer, model_flops_per_token, peak_flops_per_second
from dist_lowrank.training.checkpoints import Checkpoints, Progress
from dist_lowrank.training.data import load_data
from dist_lowrank.training.evaluate import evaluate, next_token_loss
from dist_lowrank.training.export import export_model, sample_text
from dist_lowrank.training.model import blocks, build_model, data_with_tokenizer, family, route
from dist_lowrank.training.optimizers import make_schedule
from dist_lowrank.training.strategy import make_strategy


def train(config: RunConfig, folder: RunFolder, device: torch.device) -> int:
    """Trains to the end, or to a signal. Collective over the default process group, on every rank.

    Returns:
        0, or the number of the signal (SIGINT, SIGTERM) that ended training after a step, with everything written.

    Raises:
        ConfigError: what cannot be built from this configuration.
    """
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(config.train.deterministic)
    rank = dist.get_rank()
    tensorboard = folder.tensorboard(rank) if config.telemetry.tensorboard else None
    console = Console(enabled=rank == 0, interval=config.telemetry.console_interval)
    with stop_on_signals() as stop, console, MetricsWriter(folder.metrics(rank), tensorboard) as metrics:
        return Trainer(config, folder, device, console, metrics).run(stop)


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append themselves to, for the loop to look at between steps."""
    received: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.model_configuration = model.config
        self.flops_per_token = model_flops_per_token(model, config.data.sequence_length)
        self._announce(model, route(model, config.model))
        if config.model.compile:
            for block in blocks(model):
                block.compile()
        self.strategy = make_strategy(config, model, device)
        self.optimizer = self.strategy.optimizer
        self.schedule = make_schedule(self.optimizer, config.schedule, config.train.steps)
        self.timer = StepTimer(device)
        self._time_optimizer()
        self.progress = Progress()
        state = self.strategy.state()
        self.checkpoints = Checkpoints(
            config, folder, state, self.schedule, self.data.train, device, console, self.progress
        )

    def _time_optimizer(self) -> None:
        """By hooks, because DeepSpeed calls the optimizer, and more than once per step."""
        running = ExitStack()
        self.optimizer.register_step_pre_hook(lambda *_: running.enter_context(self.timer.optimizer()))
        self.optimizer.register_step_post_hook(lambda *_: running.close())

    def _announce(self, model: torch.nn.Module, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            parameters = [p for _, p in group["params"]]
            families = dict.fromkeys(family(name) for name, _ in group["params"])
            self.console.line(
                f"{'low-rank' if group.get('low_rank', True) else 'dense'}: {len(parameters)} parameters, "
                f"{quantity(sum(p.numel() for p in parameters))} elements: {', '.join(families)}"
            )
        if self.data.unigram_loss is not None:
            self.console.line(f"unigram model: validation loss {self.data.unigram_loss:.4f}")

    def run(self, stop: list[int]) -> int:
        steps = self.config.train.steps
        self.console.start(steps)
        self.metrics.text("run/parameters", "\n".join(f"    {name}: {shape}" for name, shape in self.shapes.items()))
        done = self.checkpoints.resume()
        if done == 0:
            self._evaluate(0)
            self.progress.first_validation_loss = self.progress.validation_loss
        self.timer = StepTimer(self.device)
        stopped, step = 0, done
        for step in range(done + 1, steps + 1):
            stopped, by_clock = self._step(step, stop)
            last = step == steps or bool(stopped)
            if step % self.config.train.eval_interval == 0 or last:
                self._evaluate(step)
            if self.checkpoints.is_due(step, by_clock=by_clock, last=last):
                with self.timer.paused():
                    self.checkpoints.save(step)
            if stopped:
                break
        self.checkpoints.close()
        self.console.close()
        if stopped:
            self.console.line(f"stopped after step {step}; run folder {self.folder.attempt_path}")
        else:
            self._finish(step)
        return stopped

    def _step(self, step: int, stop: list[int]) -> tuple[int, bool]:
        """One optimizer step.

        Returns:
            The number of a signal that any rank has received, or 0, and whether the clock of any says to save.
        """
        config = self.config
        loss = self._forward_backward()
        norm = self.strategy.prepare()
        # One sum tells all ranks the same: the mean loss, whether anything is not finite, whether to stop or to save.
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        signalled = torch.tensor(float(bool(stop)), device=self.device)
        to_save = torch.tensor(float(self.checkpoints.due_by_clock), device=self.device)
        vote = torch.stack([loss.double(), bad.double(), signalled.double(), to_save.double()])
        dist.all_reduce(vote)
        mean_loss, bad_ranks, stopping, saving = vote.tolist()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        due = step % config.telemetry.log_interval == 0 or step == config.train.steps
        memory = self.strategy.memory() if due else {}
        if not self.strategy.step(skip=bool(bad_ranks)):
            self.progress.skipped_steps += 1
            self.console.line(f"step {step}: loss or gradient is not finite; update skipped")
        self.schedule.step()  # also after a skipped update: the schedule follows the data
        self.timer.end_step(config.train.global_batch_size * config.data.sequence_length)
        if due:
            self._log(step, mean_loss / self.world_size, learning_rate, memory)
        return ((stop[0] if stop else int(signal.SIGTERM)) if stopping else 0), bool(saving)

    def _forward_backward(self) -> torch.Tensor:
        """Accumulates the gradient of this rank's part of the batch; returns its mean loss, (), nats per token."""
        batches = self.data.train.next_batch()
        samples = sum(len(batch) for batch in batches)
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            batch = batch.to(self.device, non_blocking=True)
            with self.strategy.forward():
                loss = next_token_loss(self.strategy.model, batch) * (len(batch) / samples)
            self.strategy.backward(loss, last=index == len(batches) - 1)
            total = total + loss.detach()
        return total

    def _log(self, step: int, loss: float, learning_rate: float, memory: dict[str, int]) -> None:
        times = self.timer.read()
        values: dict[str, float] = {
            tags.LOSS_TRAIN: loss,
            tags.LEARNING_RATE: float(learning_rate),
            tags.GRADIENT_NORM: self.strategy.gradient_norm,
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
        self.metrics.log(step, values)
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
        with self.timer.paused():
            self.progress.validation_loss = loss = evaluate(
                self.strategy.model,
                self.data.validation,
                limit=config.train.eval_sequences,
                micro_batch_size=config.train.micro_batch_size,
                device=self.device,
                context=self.strategy.forward,
            )
        perplexity = math.exp(min(loss, 700.0))
        self.metrics.log(step, {tags.LOSS_VALIDATION: loss, tags.PERPLEXITY_VALIDATION: perplexity})
        self.console.validation(step, loss, perplexity)

    def _finish(self, step: int) -> None:
        config, line = self.config, self.console.line
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
                }
            )
        line(f"validation loss {self.progress.first_validation_loss:.4f} -> {self.progress.validation_loss:.4f}")
        line(f"run folder {self.folder.path}")
        if config.train.export:
            line(f"model      {self.folder.export} (transformers: AutoModelForCausalLM.from_pretrained)")
        if config.telemetry.tensorboard:
            line(f"curves     tensorboard --logdir {self.folder.attempt_path / 'tensorboard'}")
