"""One thread, so that the small models run fast and alike everywhere; and the parity table after the run."""

import goldens
import torch

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    if not goldens.parity:
        return
    terminalreporter.section("parity with the official numbers (worst case seen)")
    for component, (difference, tolerance, unit) in sorted(goldens.parity.items()):
        terminalreporter.write_line(f"{component:<44} {difference:9.2e} {unit:<8} of {tolerance:.0e}")
