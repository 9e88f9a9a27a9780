"""`python -m helios_sim` is the command `helios`, also where nothing is installed."""

from helios_sim.console.entry import begin


def main() -> None:
    """Begin the command."""
    begin("helios", "helios_sim.cli")


if __name__ == "__main__":
    main()
