"""What may be built on: all that a method, a task, a data set or a model outside kdbench needs, and what runs an experiment from Python.

Experimental until version 1.0. From then on semantic versioning holds for the names in `__all__` and what their docstrings and
docs/api.md say, and for nothing else in the package.
"""

from kdbench.benchmark.run import Summary, run
from kdbench.benchmark.watch import Unwatched, Watch
from kdbench.boards.leaderboard import boards
from kdbench.data.batch import Batch, Part
from kdbench.data.columns import Columns, mapped, named, several, single
from kdbench.data.encoded import EncodedImages, Store
from kdbench.data.kinds import Boxes, Enlarged, Image, Kind, Labels, Masks, Pixels, Plain, Points, Sided
from kdbench.data.sources import DataSpec, Source, open_source
from kdbench.data.vocabulary import Vocabulary
from kdbench.errors import KDBenchError, RunFailed, UserError
from kdbench.experiment import Experiment, load_experiment
from kdbench.methods.base import MAPS_ALONE, Method, OwnOptimizer, Paper, Progress, Stage, loss_precision
from kdbench.methods.presets import PerElement
from kdbench.models.build import ModelSpec
from kdbench.models.detectors.cells import CellReading
from kdbench.models.detectors.readings import Reading
from kdbench.models.inputs import InputSpec
from kdbench.models.outputs import Outputs, Shapes, TapShape, predicted
from kdbench.models.trace import Example
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.search.space import Choice, Range, When
from kdbench.tasks.base import Imitation, Role, Splits, Task, TaskInfo
from kdbench.tasks.networks import network_for
from kdbench.tasks.splits import SplitOptions, cut

__all__ = [
    "MAPS_ALONE",
    "Batch",
    "Boxes",
    "CellReading",
    "Choice",
    "Columns",
    "DataSpec",
    "EncodedImages",
    "Enlarged",
    "Example",
    "Experiment",
    "Image",
    "Imitation",
    "InputSpec",
    "KDBenchError",
    "Kind",
    "Labels",
    "Masks",
    "Method",
    "ModelSpec",
    "Outputs",
    "OwnOptimizer",
    "Paper",
    "Part",
    "PerElement",
    "Pixels",
    "Plain",
    "Points",
    "Progress",
    "Range",
    "Reading",
    "ResultStore",
    "Role",
    "RunFailed",
    "RunRecord",
    "Shapes",
    "Sided",
    "Source",
    "SplitOptions",
    "Splits",
    "Stage",
    "Store",
    "Summary",
    "TapShape",
    "Task",
    "TaskInfo",
    "Unwatched",
    "UserError",
    "Vocabulary",
    "Watch",
    "When",
    "boards",
    "cut",
    "load_experiment",
    "loss_precision",
    "mapped",
    "named",
    "network_for",
    "open_source",
    "predicted",
    "run",
    "several",
    "single",
]
