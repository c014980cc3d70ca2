"""What a job would do, before anything is queued: can it be, how many steps, how much memory and time, and what would help.

Pure arithmetic over the spec, the model's config and the counts that the preparer stored; no weight, token or device is
touched. The control plane asks it for `POST /jobs` (check_spec, plan) and `POST /jobs/plan` (both), a worker before it claims a
job, the child for its number of steps. This is its face; `shape` and `work` say what there is to do, `memory` and `time` what
that takes, `refine` what finished runs say of that, `knobs` what would take less, `coefficients` holds what had to be measured.
"""

from core.plan.check import check_spec
from core.plan.dry_run import does_not_fit, plan
from core.plan.work import count_steps

__all__ = ["check_spec", "count_steps", "does_not_fit", "plan"]
