"""How experts of one family may be kept: as differences to their merge."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DeltaStore(BaseModel):
    """`low_rank`: of every weight's difference the fewest directions that carry the share `energy` of its square, at most `rank`; what is
    no matrix whole. `sparse`: of every weight the share `density` of its entries that differ most, exactly as they are in the expert.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Literal["low_rank", "sparse"]
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Default: 0.99 where no rank is given."""
    rank: Annotated[int, Field(ge=1)] | None = None
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Default: 0.1."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.form == "sparse" and (self.energy, self.rank) != (None, None):
            raise ValueError("energy and rank are for form: low_rank; sparse differences have a density")
        if self.form == "low_rank" and self.density is not None:
            raise ValueError("density is for form: sparse; low-rank differences have an energy or a rank")
        return self
