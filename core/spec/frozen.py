"""What all parts of a spec have in common: how strict they are, and names and texts that PostgreSQL and paths can hold."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints


class Frozen(BaseModel):
    """Strict (no "3" for 3), closed (no unknown field), no NaN or infinity, immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# Free text holds no NUL: PostgreSQL has no place for one. (Lone surrogates pydantic refuses itself.)
AdapterName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$")]
DatasetId = Annotated[str, StringConstraints(pattern=r"^ds_[a-z0-9]{8,40}$")]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]
ModulePattern = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_*]{1,63}(\.[A-Za-z0-9_*]{1,63}){0,15}$")]
NewToken = Annotated[str, StringConstraints(pattern=r"^[^\x00]*[^\x00\s][^\x00]*$", max_length=64)]
MetadataKey = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$", max_length=64)]
MetadataValue = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=512)]
