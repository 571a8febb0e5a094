"""One thread and one kind of products, so that the small models run fast and alike everywhere; and the parity table after the run."""

import goldens
import pytest
import torch

from files.machine import choose_products

torch.set_num_threads(1)
choose_products()  # as all programs do


def pytest_sessionfinish(session):
    """With pytest-xdist each worker hands its part of the table over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = goldens.parity


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for component, entry in getattr(node, "workeroutput", {}).get("parity", {}).items():
        goldens.record(component, *entry)


def pytest_terminal_summary(terminalreporter):
    if not goldens.parity:
        return
    terminalreporter.section("parity with the official numbers (worst case seen)")
    for component, (difference, tolerance, unit) in sorted(goldens.parity.items()):
        terminalreporter.write_line(f"{component:<44} {difference:9.2e} {unit:<8} of {tolerance:.0e}")
