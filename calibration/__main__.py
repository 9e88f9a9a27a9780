"""`python -m calibration` is the command `helios-calibrate`, also where nothing is installed."""

from calibration.cli import main

if __name__ == "__main__":
    main()
