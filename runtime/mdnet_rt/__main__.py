"""`python -m mdnet_rt`: the command `mdnet-rt`."""

from mdnet_rt.cli.main import main

if __name__ == "__main__":
    main()
