"""Tasks of the LM Evaluation Harness (`lm_eval`, an optional extra), through its own Python API."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.errors import UserError, first_five
from linearize_cli.inputs import user_path


class Harness:
    """Loads tasks once and runs them on any causal language model.

    Args:
        names: of tasks or groups, as `lm_eval ls tasks` lists them, or YAML files of your own.

    Raises:
        UserError: lm_eval is not installed, or there is no such task.
    """

    def __init__(self, names: Sequence[str]):
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"--tasks needs lm_eval, which cannot be imported: {error}",
                'Install it: pip install "linearize-cli[eval]"',
            ) from None
        self.evaluate, self.model, self.names = lm_eval.simple_evaluate, HFLM, list(names)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.manager = TaskManager()
        files = {name for name in names if name.endswith((".yaml", ".yml")) and user_path(name).is_file()}
        unknown = {*names} - files - {*self.manager.all_tasks}
        if unknown:
            raise UserError(
                f"lm_eval has no task {first_five(unknown)}",
                "`lm_eval ls tasks` lists them; a task of your own is a YAML file: --tasks my-task.yaml",
            )
        try:
            self.manager.load(self.names)
        except Exception as error:  # what it raises depends on the task, its file and the data behind it
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"lm_eval cannot load {', '.join(names)}: {said}",
                "Its data must be at hand, or the network; a file must be a task as lm_eval describes it.",
            ) from error

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> dict[str, dict[str, Any]]:
        """`{task: {metric: value}}`."""
        results = self.evaluate(
            model=self.model(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=8),
            tasks=self.names,
            task_manager=self.manager,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )["results"]
        return {
            task: {
                metric.removesuffix(",none"): value
                for metric, value in values.items()
                if isinstance(value, float)
            }
            for task, values in results.items()
        }
