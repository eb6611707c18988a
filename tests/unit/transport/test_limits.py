from dataclasses import fields

import pytest

from ztserve.errors import ConfigError
from ztserve.transport import Limits


@pytest.mark.parametrize("name", [one.name for one in fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, True, float("inf"), float("nan"), 1 << 31])
def test_no_limit_can_be_switched_off(name: str, value) -> None:
    with pytest.raises(ConfigError, match=f"transport limit {name} = .*switched off"):
        Limits(**{name: value})


def test_more_threads_than_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_in_flight = 1025: at most 1024"):
        Limits(max_in_flight=1025)
