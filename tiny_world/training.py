"""What the stages share: the work folder, the time budget, fp32 master weights with EMA, and the captured step.

Knows modules and budgets; does not know pictures or losses.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how a stage runs.

    minutes: the total time of the stage; the learning rate anneals over it. this_call: minutes after which this call
    saves its state and stops; the next call continues. workers: processes that make data. eager: no CUDA graph.
    """

    workdir: Path
    device: str
    smoke: bool
    minutes: float
    this_call: float
    workers: int
    eager: bool = False

    @property
    def fetch(self) -> Path:
        """The results: half-precision weights, logs and sheets."""
        folder = self.workdir / "fetch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def state(self) -> Path:
        """Full-precision weights and optimizer state, to continue from."""
        folder = self.workdir / "state"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    def record(self, stage: str, **values: object) -> None:
        """Append one line to the log."""
        with (self.fetch / "log.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, **values}) + "\n")
        log.info("%s %s", stage, values)


def learning_rate(peak: float, step: int, progress: float, warmup: int) -> float:
    """A linear warm-up over steps, then half a cosine over the time, down to 1 % of the peak. progress: 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min((step + 1) / warmup, 1.0) * (0.01 + 0.99 * cosine)


@dataclass(kw_only=True)
class Trainer:
    """AdamW on fp32 master weights, with an EMA of them. The modules themselves have the run's compute dtype.

    modules: name -> module, already on the device. Optimizer and EMA use device tensors only, so a CUDA graph can hold a
    whole step.
    """

    modules: dict[str, nn.Module]
    run: Run
    peak: float
    warmup: int
    ema_decay: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    step: int = 0
    elapsed: float = 0.0
    params: list[nn.Parameter] = field(init=False)
    masters: list[nn.Parameter] = field(init=False)
    ema: list[Tensor] = field(init=False)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = [(f"{m}.{n}", p) for m, module in self.modules.items() for n, p in module.named_parameters()]
        self.names = [name for name, p in named if p.requires_grad]
        params = [p for _, p in named if p.requires_grad]
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in params]
        for module in self.modules.values():
            module.to(self.run.dtype)
        self.params = params
        self.ema = [p.detach().clone() for p in self.masters]
        self.decay = torch.tensor(0.0, device=self.run.device)
        self.lr = torch.tensor(0.0, device=self.run.device) if self.run.cuda else 0.0
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=self.run.cuda,
            capturable=self.run.cuda,
        )

    def train(
        self, loss_fn: Callable[[], Tensor], *, stage: str, every: Callable[[Trainer], None] | None = None
    ) -> bool:
        """Train until the time of the stage or of this call is over. Returns whether the stage's time is over.

        every: called about every three minutes. Its time counts.
        """
        step = self._captured(loss_fn)
        start, before, last_sheet = time.monotonic(), self.elapsed, time.monotonic()
        total, limit = self.run.minutes * 60, self.run.this_call * 60
        running = torch.zeros((), device=self.run.device)
        period = 1 if self.run.smoke else 20
        while True:
            spent = time.monotonic() - start
            self.elapsed = before + spent
            if self.elapsed >= total or spent >= limit:
                break
            self._set_rates(self.elapsed / total)
            for _ in range(period):
                running += step()
                self.step += 1
            loss = float(running) / period
            running.zero_()
            self.losses.append(loss)
            if self.step == period or self.step % (5 * period) == 0:
                rate = self.step / max(self.elapsed, 1e-9)
                self.run.record(
                    stage,
                    step=self.step,
                    loss=round(loss, 5),
                    seconds=round(self.elapsed, 1),
                    per_s=round(rate, 2),
                )
            if not math.isfinite(loss):
                raise FloatingPointError(f"{stage}: the loss is {loss} at step {self.step}")
            if every and time.monotonic() - last_sheet > 180:
                last_sheet = time.monotonic()
                self.save(stage)
                every(self)
        self.save(stage)
        return self.elapsed >= total

    def load_ema(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Copy the EMA into other modules of the same shapes and return them."""
        targets = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        with torch.no_grad():
            for name, value in zip(self.names, self.ema, strict=True):
                targets[name].copy_(value)
        return modules

    def save(self, stage: str) -> None:
        """Save everything that `resume` needs, as safetensors."""
        tensors: dict[str, Tensor] = {}
        for name, master, ema in zip(self.names, self.masters, self.ema, strict=True):
            tensors[f"master/{name}"], tensors[f"ema/{name}"] = master.detach(), ema
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        meta = {"step": str(self.step), "elapsed": str(self.elapsed)}
        partial = self.run.state / f"{stage}.partial"
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=meta)
        partial.replace(self.run.state / f"{stage}.safetensors")
        (self.run.state / f"{stage}.json").write_text(
            json.dumps({"step": self.step, "elapsed": self.elapsed})
        )

    def resume(self, stage: str) -> None:
        """Continue from the saved state, if there is one."""
        file = self.run.state / f"{stage}.safetensors"
        if not file.exists():
            return
        tensors = load_file(file, device=self.run.device)
        with torch.no_grad():
            for name, master, ema, param in zip(self.names, self.masters, self.ema, self.params, strict=True):
                master.copy_(tensors[f"master/{name}"])
                ema.copy_(tensors[f"ema/{name}"])
                param.copy_(master)
                if f"exp_avg/{name}" in tensors:
                    self.optimizer.state[master] = {
                        k: tensors[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq")
                    }
        counts = json.loads((self.run.state / f"{stage}.json").read_text())
        self.step, self.elapsed = counts["step"], counts["elapsed"]
        log.info("%s: resumed at step %d, %.0f s", stage, self.step, self.elapsed)

    def _set_rates(self, progress: float) -> None:
        rate = learning_rate(self.peak, self.step, progress, self.warmup)
        if isinstance(self.lr, Tensor):
            self.lr.fill_(rate)
        else:
            self.optimizer.param_groups[0]["lr"] = rate
        self.decay.fill_(min(self.ema_decay, (1 + self.step) / (10 + self.step)))

    def _one_step(self, loss_fn: Callable[[], Tensor]) -> Tensor:
        """One training step: loss, gradients for the masters, clipped AdamW, new weights, EMA."""
        for p in self.params:
            p.grad = None
        loss = loss_fn()
        loss.backward()
        used = [(m, p) for m, p in zip(self.masters, self.params, strict=True) if p.grad is not None]
        for master, param in used:
            assert param.grad is not None
            master.grad = (
                param.grad.float().contiguous()
            )  # in the masters' layout: fused AdamW needs one layout
        torch.nn.utils.clip_grad_norm_([m for m, _ in used], 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
            torch._foreach_mul_(self.ema, self.decay)
            torch._foreach_add_(self.ema, torch._foreach_mul(self.masters, 1 - self.decay))
        return loss.detach()

    def _captured(self, loss_fn: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The step as one CUDA graph if possible, else as it is. Random draws advance with each replay."""
        if not self.run.cuda or self.run.eager:
            return lambda: self._one_step(loss_fn)
        self._set_rates(self.elapsed / max(self.run.minutes * 60, 1e-9))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                self._one_step(loss_fn)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                captured = self._one_step(loss_fn)
        except RuntimeError as error:
            log.warning("No CUDA graph, so steps run one kernel at a time: %s", str(error).splitlines()[0])
            torch.cuda.synchronize()
            return lambda: self._one_step(loss_fn)

        def replay() -> Tensor:
            graph.replay()
            return captured

        return replay


def save_half_weights(module: nn.Module, file: Path) -> None:
    """Save a module's weights in half precision."""
    save_file({k: v.detach().half().cpu().contiguous() for k, v in module.state_dict().items()}, file)


def load_half_weights(module: nn.Module, file: Path) -> None:
    """Load a module's weights. Raises FileNotFoundError with the missing file's name."""
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing: run the stage that writes it, or put the fetched file there"
        )
    module.load_state_dict({k: v.float() for k, v in load_file(file).items()})
