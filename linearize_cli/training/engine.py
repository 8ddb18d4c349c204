"""The processes of one run, as `accelerate launch` or `torchrun` start them, and what they do together."""

import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    disable_fsdp_ram_efficient_loading,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy

from linearize_cli.errors import UserError
from linearize_cli.training.parallel import full, sharded

TIMEOUT = timedelta(minutes=30)  # for a step of another process; one that has died is noticed at once
PATIENCE = timedelta(days=1)  # for what the main process does alone, such as writing the text of `self`
SUPPORTED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
}
_runs = count()


class Engine:
    """The processes of one run; one process where nothing launched several.

    Attributes:
        processes: how many there are; main: whether this one prints, writes and saves.
        device: where this process computes: of several, the one that `accelerate` gives it.
        home: where the whole model is kept: with shards on the CPU.
        plugin: the settings of FSDP2, if the parameters are to be sharded.

    Raises:
        UserError: a way of distributing that this is not made for, or a tracker that is not there.
    """

    def __init__(
        self,
        device: str = "cpu",
        trackers: Sequence[str | GeneralTracker] = (),
        logging_dir: Path | None = None,
    ):
        check_trackers(trackers)
        handlers = [
            InitProcessGroupKwargs(timeout=TIMEOUT),
            # A part that sees nothing, as the far one in short text, gets no gradient.
            DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
        ]
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else accelerate takes many processes on CPUs for one
            mixed_precision="no",  # --dtype says it
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(logging_dir=str(logging_dir)),
            kwargs_handlers=handlers,
        )
        self.processes, self.main = self.accelerator.num_processes, self.accelerator.is_main_process
        self.plugin = fsdp_plugin() if self.processes > 1 else None
        if self.accelerator.distributed_type not in SUPPORTED:
            raise UserError(
                f"accelerate is set to distribute by {self.accelerator.distributed_type.value}",
                "This version uses DDP or FSDP 2: run `accelerate config` again.",
            )
        self.device = str(self.accelerator.device) if self.processes > 1 else device
        self.calls, self.store = count(), None
        if self.processes > 1:
            self.store = dist.PrefixStore(
                f"linearize-{next(_runs)}", dist.distributed_c10d._get_default_store()
            )

    @property
    def home(self) -> str:
        return "cpu" if self.plugin is not None else self.device

    def share(self, rows: Any) -> Any:
        """This process's rows of a batch, on its device."""
        size = len(rows) // self.processes
        first = self.accelerator.process_index * size
        return rows[first : first + size].to(self.device)

    def inference(self, model: nn.Module) -> nn.Module:
        """The model to evaluate with, on all processes alike: sharded if it is to be."""
        if self.plugin is None:
            return model
        return self.sharded(model)

    def sharded(self, module: nn.Module) -> nn.Module:
        reshard = self.plugin.reshard_after_forward
        return sharded(module, torch.device(self.device), reshard_after_forward=reshard)

    @contextmanager
    def training(self, objective: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The objective as all processes call it (its gradients are then their mean), and the one whose
        parameters an optimizer steps. When the context ends, `objective` has what was trained.
        """
        if self.plugin is not None:
            trained = self.sharded(objective)
            yield trained, trained
            with torch.no_grad():
                whole = dict(objective.named_parameters())
                for name, parameter in trained.named_parameters():
                    if parameter.requires_grad:
                        whole[name].copy_(full(parameter.detach()))
        elif self.processes > 1:
            yield self.accelerator.prepare_model(objective), objective
            self.accelerator.free_memory()
        else:
            yield objective, objective

    def on_main(self, function: Callable, *arguments: Any) -> Any:
        """What a function returns on the main process, which alone calls it; the others wait."""
        if self.processes == 1:
            return function(*arguments)
        key = f"call-{next(self.calls)}"
        if not self.main:
            self.store.wait([key], PATIENCE)
            answer = self.store.get(key)
            if not answer:
                raise SystemExit(UserError.exit_code)
            return pickle.loads(answer)
        answer = b""
        try:
            value = function(*arguments)
            answer = pickle.dumps(value)
        finally:
            self.store.set(key, answer)
        return value

    def only_main(self, context: Callable[..., AbstractContextManager], *arguments: Any):
        """A context that only the main process enters."""
        return context(*arguments) if self.main else nullcontext()

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error of several processes is told once, by the first that has it; the others end quietly."""
        if self.processes == 1:
            yield
            return
        handled = self.main and threading.current_thread() is threading.main_thread()
        # Only the main process has something to tell; the others end at once, wherever they are.
        before = signal.signal(signal.SIGTERM, ended) if handled else None
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self.failed_first():
                raise
            interrupted = isinstance(error, KeyboardInterrupt)
            raise SystemExit(130 if interrupted else getattr(error, "exit_code", 3)) from None
        finally:
            if handled and signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # else its message comes first
                signal.signal(signal.SIGTERM, before)

    def failed_first(self) -> bool:
        try:
            return self.store.add("failed", 1) == 1
        except RuntimeError:  # the store went with the process that held it
            return True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While open, the end of another process is a UserError here."""
        try:
            yield
        except RuntimeError as error:
            if self.processes > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                ended()
            raise

    def track(self, name: str, settings: dict[str, Any]) -> None:
        """Open the trackers.

        Raises:
            UserError: a tracker refuses.
        """
        if not self.accelerator.log_with:
            return
        try:
            self.accelerator.init_trackers(name, config={k: str(v) for k, v in flat(settings).items()})
        except Exception as error:  # each tracker has its own: no account, no network, no disk
            names = ", ".join(map(str, self.accelerator.log_with))
            raise UserError(
                f"--tracker {names}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                "Set it up as its documentation says (WANDB_MODE=offline needs no account), or leave --tracker out.",
            ) from error

    def tell(self, values: dict[str, Any], step: int) -> None:
        """Numbers for the trackers, in dicts of any depth."""
        if self.accelerator.log_with:
            self.accelerator.log(flat(values), step=step)

    def finish(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()


def ended(*signal_and_frame: object) -> None:
    """Another process of the run has ended, so this one does; a launcher says so by SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise UserError(
        "another process of this run has ended", "If it had a message, it stands beside this one."
    )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a/b": 1}`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}/")
        else:
            result[f"{prefix}{key}"] = value
    return result


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP2, if the launcher was given any. On CPUs accelerate itself passes them over.

    Raises:
        UserError: they ask for FSDP 1, or for what this is not made for.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError("accelerate is set to FSDP 1", "Write fsdp_version: 2 into its fsdp_config.")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError(
            "fsdp_offload_params is not in this version", "Write false into accelerate's fsdp_config."
        )
    # Else transformers would give weights to the first process alone. They are mapped from their files, so the
    # processes of a machine share the memory anyway.
    disable_fsdp_ram_efficient_loading()
    return plugin


def check_trackers(trackers: Sequence[str | GeneralTracker]) -> None:
    """Raises UserError: one is unknown, or its package is missing."""
    known = [kind.value for kind in LoggerType if kind != LoggerType.ALL]
    available = [kind.value for kind in get_available_trackers()]
    for name in trackers:
        if isinstance(name, GeneralTracker):
            continue
        if name not in known:
            raise UserError(f"--tracker {name}: no such tracker", f"accelerate has {', '.join(known)}.")
        if name not in available:
            raise UserError(f"--tracker {name}: the package {name} is not installed", f"pip install {name}")


def mean_of(values: dict[str, Any], mean: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Scalars in dicts of any depth, as numbers after `mean`, which is called once for all."""
    flattened = flat(values)
    if not flattened:
        return {}
    numbers = iter(mean(torch.stack([value.detach().float() for value in flattened.values()])).tolist())

    def fill(part: dict[str, Any]) -> dict[str, Any]:
        return {key: fill(v) if isinstance(v, dict) else next(numbers) for key, v in part.items()}

    return fill(values)
