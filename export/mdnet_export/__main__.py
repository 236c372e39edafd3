"""`python -m mdnet_export`: the command `mdnet-export`."""

from mdnet_export.cli.main import main

if __name__ == "__main__":
    main()
