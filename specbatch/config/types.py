"""Types of values of a configuration, each with the rule that it follows."""

from __future__ import annotations

from typing import Annotated

from specbatch.config.rules import NOT_EMPTY, ONE_LINE, above, at_least, below, between

Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Seconds = Annotated[float, above(0)]
Share = Annotated[float, between(0, 1)]
Beta = Annotated[float, at_least(0), below(1)]
PathText = Annotated[str, ONE_LINE, NOT_EMPTY]
