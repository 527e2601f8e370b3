"""Runs before every test module: no network, and no skip without a reason."""

import os
from fnmatch import fnmatchcase

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; the workers of xdist share the cores

import pytest

TRANSFORMERS_MARKERS = (
    "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test order slow torch_compile_test"
)


def pytest_configure(config):
    for marker in TRANSFORMERS_MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: set by transformers' own tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In a module with a table `EXPECTED_SKIPS` {pattern of Class.test: reason}, any other skip is a failure."""
    report = yield
    expected = getattr(item.module, "EXPECTED_SKIPS", None) if hasattr(item, "module") else None
    if expected is None or not report.skipped or hasattr(report, "wasxfail"):
        return report
    name = f"{item.cls.__name__}.{item.name}" if item.cls else item.name
    reason = next((reason for pattern, reason in expected.items() if fnmatchcase(name, pattern)), None)
    if reason is not None:
        report.longrepr = (str(item.path), 0, f"Skipped: {reason}")  # pytest -rs shows it
    else:
        report.outcome = "failed"
        report.longrepr = f"{name} is skipped and not in EXPECTED_SKIPS: {report.longrepr[2]}"
    return report
