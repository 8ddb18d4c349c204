"""Tasks of the LM Evaluation Harness (`lm_eval`, an optional dependency)."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize_cli.errors import UserError, first_five
from linearize_cli.inputs import user_path


class Harness:
    """Tasks of lm_eval, loaded once, to run on any causal language model.

    Args:
        names: names of tasks or groups from `lm_eval ls tasks`, or YAML files.

    Raises:
        UserError: lm_eval is not installed, or a task is unknown or cannot be loaded.
    """

    def __init__(self, names: Sequence[str]):
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"--tasks needs lm_eval, which cannot be imported: {error}",
                "Install it: pip install 'lm_eval>=0.4.9'",
            ) from None
        self.evaluate, self.model, self.names = lm_eval.simple_evaluate, HFLM, list(names)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.manager = TaskManager()
        files = {name for name in names if name.endswith((".yaml", ".yml")) and user_path(name).is_file()}
        unknown = {*names} - files - {*self.manager.all_tasks}
        if unknown:
            raise UserError(
                f"lm_eval has no task {first_five(unknown)}",
                "`lm_eval ls tasks` lists the names. Your own task is a YAML file: --tasks my-task.yaml",
            )
        try:
            self.manager.load(self.names)
        except Exception as error:  # the type depends on the task, its file and its data
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"lm_eval cannot load {', '.join(names)}: {said}",
                "Check that its data is on this machine or can be downloaded, and that a YAML file is a valid task.",
            ) from error

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> dict[str, dict[str, Any]]:
        """Run all tasks on a model and return `{task: {metric: value}}`."""
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
