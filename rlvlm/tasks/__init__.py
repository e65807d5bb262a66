"""Sources of tasks: visual generators and data sets. Imports neither torch nor datasets."""

from rlvlm.tasks.errors import TaskSourceError
from rlvlm.tasks.images import ImageStore
from rlvlm.tasks.mix import check_sources, draw_pool, draw_tasks, load_generator

__all__ = ["ImageStore", "TaskSourceError", "check_sources", "draw_pool", "draw_tasks", "load_generator"]
