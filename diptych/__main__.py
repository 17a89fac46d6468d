"""`python -m diptych`: the command, also where no console script is installed."""

from diptych.cli import main

if __name__ == "__main__":
    main()
