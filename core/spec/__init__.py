"""JobSpec: what a user asks for. Validated once at submit, stored as JSON, handed to the child, never changed.

Unions are told apart by `kind`, so each choice carries only its own fields; unknown fields are refused at any depth.
Units are in the names. Ranges stand in the JSON schema, so the OpenAPI page shows them. A function of the engine takes
the part it needs (`OptimSpec`), never the whole. This is its face; one file a subject stands behind it.
"""

from core.spec.course import BatchSpec, CheckpointSpec, OptimSpec, ScheduleSpec
from core.spec.data import DatasetRef, DataSpec
from core.spec.evaluation import EarlyStopping, EvalMetric, EvalSpec, GenerationEval
from core.spec.frozen import AdapterName, Frozen
from core.spec.job import JobSpec, upgrade_spec, with_rows_at_once
from core.spec.objectives import (
    DATA_KINDS,
    OBJECTIVES,
    PICTURE_KINDS,
    DataKind,
    DpoObjective,
    InfoNceObjective,
    Objective,
    OrpoObjective,
    PlainTextObjective,
    SftObjective,
)
from core.spec.pictures import PictureSpec
from core.spec.tuning import (
    Fp4Quantization,
    Fp8Quantization,
    FullTuning,
    Int8Quantization,
    LoraTuning,
    MoraTuning,
    Nf4Quantization,
    NoQuantization,
    ProjectionTuning,
    Quantization,
)

__all__ = [
    "DATA_KINDS",
    "OBJECTIVES",
    "PICTURE_KINDS",
    "AdapterName",
    "BatchSpec",
    "CheckpointSpec",
    "DataKind",
    "DataSpec",
    "DatasetRef",
    "DpoObjective",
    "EarlyStopping",
    "EvalMetric",
    "EvalSpec",
    "Fp4Quantization",
    "Fp8Quantization",
    "Frozen",
    "FullTuning",
    "GenerationEval",
    "InfoNceObjective",
    "Int8Quantization",
    "JobSpec",
    "LoraTuning",
    "MoraTuning",
    "Nf4Quantization",
    "NoQuantization",
    "Objective",
    "OptimSpec",
    "OrpoObjective",
    "PictureSpec",
    "PlainTextObjective",
    "ProjectionTuning",
    "Quantization",
    "ScheduleSpec",
    "SftObjective",
    "upgrade_spec",
    "with_rows_at_once",
]
