"""`python -m calibration` is the command `helios-calibrate`, also where nothing is installed."""

from helios_sim.console.entry import begin


def main() -> None:
    """Begin the command."""
    begin("helios-calibrate", "calibration.cli")


if __name__ == "__main__":
    main()
