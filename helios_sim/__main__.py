"""`python -m helios_sim` is the command `helios`, also where nothing is installed."""

from helios_sim.cli import main

if __name__ == "__main__":
    main()
