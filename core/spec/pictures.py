"""What a job asks for beside a text job, where its rows have pictures."""

from typing import Literal

from pydantic import Field

from core.spec.frozen import Frozen


class PictureSpec(Frozen):
    image_tower: Literal["trained", "locked"] = Field(
        default="trained",
        description="locked: nothing of what a picture goes through is trained, its projection neither (LiT, arXiv 2111.07991).",
    )
