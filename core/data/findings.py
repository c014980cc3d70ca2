"""What is wrong with an upload, gathered while it is read: errors keep something out, warnings do not.

Of each the first KEPT_PROBLEMS are kept, and all are counted.
"""

from dataclasses import dataclass, field

from core.errors import Problem
from core.records import RowProblem

KEPT_PROBLEMS = 100


@dataclass
class Findings:
    error_count: int = 0
    warning_count: int = 0
    errors: list[RowProblem] = field(default_factory=list)
    warnings: list[RowProblem] = field(default_factory=list)

    def refuse(self, problem: Problem) -> None:
        self.error_count += 1
        if len(self.errors) < KEPT_PROBLEMS:
            self.errors.append(_as_record(problem))

    def warn(self, problem: Problem) -> None:
        self.warning_count += 1
        if len(self.warnings) < KEPT_PROBLEMS:
            self.warnings.append(_as_record(problem))

    def broken_by(self, problems: tuple[Problem, ...]) -> None:
        """Take what broke the file. It goes first: it must not be lost behind the errors before it."""
        self.error_count += len(problems)
        self.errors[:0] = map(_as_record, problems)
        del self.errors[KEPT_PROBLEMS:]


def _as_record(problem: Problem) -> RowProblem:
    return RowProblem(row=problem.row, line=problem.line, field=problem.field, code=problem.code, message=problem.message)
