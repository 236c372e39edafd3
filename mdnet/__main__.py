"""`python -m mdnet`: the command `mdnet`."""

from mdnet.cli.main import main

if __name__ == "__main__":
    main()
