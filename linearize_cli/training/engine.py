"""The processes of one training run. `accelerate launch` or `torchrun` start and supervise them."""

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

TIMEOUT = timedelta(minutes=30)  # of a collective operation; a process that died is noticed at once
PATIENCE = timedelta(days=1)  # of a wait for the main process, which may write the text of `self` for hours
SUPPORTED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
}
_runs = count()


class Engine:
    """The processes of one training run. Without a launcher there is one.

    Args:
        device: the device to use if there is one process.
        trackers: the experiment trackers to send numbers to, by accelerate's names or as objects.
        logging_dir: the folder of trackers that write files.

    Attributes:
        processes: the number of processes.
        main: True in the process that prints, writes and saves.
        device: the device of this process. With several processes, `accelerate` assigns it.
        home: the device of the whole model. It is the CPU if the parameters are sharded.
        plugin: the settings of FSDP2 if the parameters are sharded, else None.

    Raises:
        UserError: the kind of distribution is not supported, or a tracker is not available.
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
            # Some parameters may get no gradient, such as those of the linear part in short text.
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
        if self.processes > 1:
            self.waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
            self.store = dist.PrefixStore(
                f"linearize-{next(_runs)}", dist.distributed_c10d._get_default_store()
            )

    @property
    def home(self) -> str:
        return "cpu" if self.plugin is not None else self.device

    def share(self, rows: Any) -> Any:
        """Return the rows of a batch that belong to this process, on its device.

        Args:
            rows: the rows of the batch of all processes: a tensor or `Blocks`.
        """
        size = len(rows) // self.processes
        first = self.accelerator.process_index * size
        return rows[first : first + size].to(self.device)

    def inference(self, model: nn.Module) -> nn.Module:
        """Return the model to evaluate with: a sharded copy under FSDP, else the model itself."""
        if self.plugin is None:
            return model
        return self.sharded(model)

    def sharded(self, module: nn.Module) -> nn.Module:
        reshard = self.plugin.reshard_after_forward
        return sharded(module, torch.device(self.device), reshard_after_forward=reshard)

    @contextmanager
    def training(self, objective: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield two objectives: the one to call, and the one whose parameters to optimize.

        The call averages the gradients over the processes. With one process both are `objective` itself. When
        the context ends, `objective` has the trained parameters.
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
        """Call a function in the main process, and return its result in all processes."""
        result = [function(*arguments) if self.main else None]
        if self.processes > 1:
            dist.broadcast_object_list(result, group=self.waiting)
        return result[0]

    def only_main(self, context: Callable[..., AbstractContextManager], *arguments: Any):
        """Return `context(*arguments)` in the main process, and a context that does nothing in the others."""
        return context(*arguments) if self.main else nullcontext()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let the process that fails first report its error, while the context is open. The others end
        without a message.

        The launcher ends the others by SIGTERM, or their collective operations fail. A single process is not
        affected.
        """
        if self.processes == 1:
            yield
            return
        handled = self.main and threading.current_thread() is threading.main_thread()
        # The main process says how to resume. The others end at once.
        before = signal.signal(signal.SIGTERM, ended) if handled else None
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self.failed_first():
                raise
            interrupted = isinstance(error, KeyboardInterrupt)
            raise SystemExit(130 if interrupted else getattr(error, "exit_code", 3)) from None
        finally:
            if handled and signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # its message comes first
                signal.signal(signal.SIGTERM, before)

    def failed_first(self) -> bool:
        """Return True if this is the first process of the run that fails."""
        try:
            return self.store.add("failed", 1) == 1
        except RuntimeError:  # the store ended with the process that held it
            return True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the failure of a collective operation into a UserError that says that another process has
        ended, while the context is open.
        """
        try:
            yield
        except RuntimeError as error:
            if self.processes > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                ended()
            raise

    def track(self, name: str, settings: dict[str, Any]) -> None:
        """Start a run in each tracker. Do nothing without trackers.

        Args:
            name: the name of the run.
            settings: its settings. Nested dicts are flattened.

        Raises:
            UserError: a tracker cannot be started.
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
        """Send the numbers of a step, in dicts of any depth, to the trackers."""
        if self.accelerator.log_with:
            self.accelerator.log(flat(values), step=step)

    def finish(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()


def ended(*signal_and_frame: object) -> None:
    """End this process with a UserError because another one has ended. It is also the handler of the
    launcher's SIGTERM.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise UserError("another process of this run has ended", "See its error message above.")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict: `{"a": {"b": 1}}` gives `{"a/b": 1}`. All keys begin with `prefix`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}/")
        else:
            result[f"{prefix}{key}"] = value
    return result


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """Return the settings of FSDP2, or None if the launcher gives none. On CPUs accelerate itself would
    ignore them.

    Raises:
        UserError: the settings request FSDP 1 or offloading, which are not supported.
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
    # Otherwise transformers would load weights in the first process only. They are mapped from their files, so the
    # processes of a machine share the memory anyway.
    disable_fsdp_ram_efficient_loading()
    return plugin


def check_trackers(trackers: Sequence[str | GeneralTracker]) -> None:
    """Check that the trackers are available.

    Raises:
        UserError: a tracker is unknown, or its package is not installed.
    """
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
    """Apply a function to all scalar tensors in dicts of any depth in one call, and return the dicts with its
    results.

    Args:
        values: the dicts.
        mean: maps the scalars `[n]` to their means `[n]`, over the processes for example.

    Returns:
        the same dicts with Python numbers.
    """
    flattened = flat(values)
    if not flattened:
        return {}
    numbers = iter(mean(torch.stack([value.detach().float() for value in flattened.values()])).tolist())

    def fill(part: dict[str, Any]) -> dict[str, Any]:
        return {key: fill(v) if isinstance(v, dict) else next(numbers) for key, v in part.items()}

    return fill(values)
