"""The tasks of ``lightning predict``."""

from vrnn_lightning.callbacks.tasks.base import Prediction, Task
from vrnn_lightning.callbacks.tasks.encode import Encode, Reconstruct
from vrnn_lightning.callbacks.tasks.forecast import Forecast
from vrnn_lightning.callbacks.tasks.generate import Generate
from vrnn_lightning.callbacks.tasks.impute import Impute
from vrnn_lightning.callbacks.tasks.score import Score

__all__ = ["TASKS", "Encode", "Forecast", "Generate", "Impute", "Prediction", "Reconstruct", "Score", "Task"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Encode, Generate, Reconstruct, Forecast, Impute, Score)}
"""The tasks by the names that ``--prediction.task`` takes."""
