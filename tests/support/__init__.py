"""What the tests share: models, commands, edits of folders, a stand-in for the Hub, and programs that break things."""

import pkgutil
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
TINY = TESTS / "models" / "wina-lab-tiny"  # the embedded trained model

pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
