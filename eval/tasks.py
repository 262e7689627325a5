"""Tasks of lm-evaluation-harness, on whatever `eval` measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from quantize.checkpoint.paths import LARGEST_JSON, folder_of
from quantize.checkpoint.tokenizer import load_tokenizer
from quantize.errors import UsageError, reason, shown
from quantize.eval.installed import require_lm_eval
from quantize.eval.loading import load_any
from quantize.graph.export import quiet
from quantize.scheme.scheme import Engine

BATCH = 8  # rows that run together


def evaluate_tasks(
    directory: Path, against: str | None, tasks: Sequence[str], limit: int | None = None, engine: Engine = "fake_quant"
) -> dict[str, Any]:
    """Measure a language model on tasks of lm-evaluation-harness.

    Args:
        directory: an artifact, a float model, a checkpoint of compressed-tensors, or a GGUF file beside its config.
        against: the float model to compare with; None leaves the comparison out.
        tasks: names of tasks, whose data the hub or its cache has, or YAML files of tasks, whose data may be files.
        limit: the largest number of documents of each task; None takes all.
        engine: how an artifact runs, as in `quantize.load`.

    Returns:
        A flat dict: `TASK.METRIC`, and with `against` also `TASK.METRIC_against`, for each metric of each task.

    Raises:
        UsageError: lm-eval is not installed, or there is no such task, or the model is no language model.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [task_name(Path(task)) if Path(task) in files else task for task in tasks]
    manager = TaskManager(include_path=sorted({str(file.absolute().parent) for file in files}) or None)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise UsageError(f"lm-eval has no task {shown(unknown[0])}; `lm-eval ls tasks` lists them, or give a YAML file")
    found = scores(directory, load_any(directory, engine), names, manager, limit)
    if against is not None:
        reference = scores(Path(against), load_any(against), names, manager, limit)
        found |= {f"{name}_against": value for name, value in reference.items()}
    return found


def task_name(file: Path) -> str:
    """Return the name that a YAML file gives to its task.

    Raises:
        UsageError: there is no such file, or it names none.
    """
    import yaml

    if not file.is_file() or file.stat().st_size > LARGEST_JSON:
        raise UsageError(f"no such task file: {file}")
    line = next((x for x in file.read_text(encoding="utf-8").splitlines() if x.startswith("task:")), "")
    name = (yaml.safe_load(line) or {}).get("task") if line else None
    if not isinstance(name, str):
        raise UsageError(f"{file} names no task; give it a line `task: NAME`")
    return name


def scores(directory: Path, model: nn.Module, names: Sequence[str], manager: Any, limit: int | None) -> dict[str, Any]:
    """Return the metrics of some tasks for one model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if not getattr(model, "can_generate", lambda: False)():
        raise UsageError(f"{directory} is no language model, and --tasks is for these")
    with quiet():
        try:
            judged = HFLM(pretrained=model, tokenizer=load_tokenizer(folder_of(directory)), batch_size=BATCH)
            results = simple_evaluate(model=judged, tasks=list(names), limit=limit, task_manager=manager)["results"]
        except Exception as error:  # data that cannot be fetched, a task that does not fit
            raise UsageError(f"{', '.join(names)} cannot be measured on {directory} ({reason(error)})") from error
    return {f"{task}.{label(key)}": value for task, row in results.items() for key, value in row.items() if "," in key}


def label(key: str) -> str:
    """Return a metric's name with its filter, if it has one: `acc` for `acc,none`."""
    name, _, given = key.partition(",")
    return name if given == "none" else f"{name}.{given}"
