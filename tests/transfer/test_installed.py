"""A Mooncake that can't do what is asked of it is found before anything is started."""

from __future__ import annotations

from types import ModuleType

import pytest

from specbatch.errors import UserError
from specbatch.transfer.mooncake import NEEDED, refuse_old, store_module


def test_the_installed_mooncake_has_all_that_is_used() -> None:
    refuse_old(store_module())


@pytest.mark.parametrize("lacking", ["batch_remove", "batch_get_into", "close"])
def test_a_mooncake_without_a_method_is_refused_by_name_and_with_the_needed_version(lacking: str) -> None:
    whole, old = store_module(), ModuleType("mooncake.store")
    names = {
        name: None for name in vars(whole.MooncakeDistributedStore) if not name.startswith("_") and name != lacking
    }
    old.MooncakeDistributedStore = type("MooncakeDistributedStore", (), names)  # type: ignore[attr-defined]
    old.ReplicateConfig = whole.ReplicateConfig  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=f"has no MooncakeDistributedStore.{lacking}; {NEEDED} is the oldest"):
        refuse_old(old)
