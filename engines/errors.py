"""The errors a user is meant to read: one line that says what was wrong, what was expected and what to do."""


class MDNetError(Exception):
    """Work that could not be done. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(MDNetError):
    """Something the user typed can't be right: a missing path, an unknown preset, options that contradict."""

    exit_code = 2


class BundleError(MDNetError):
    """A bundle that can't be trusted or read: bad manifest, wrong hash, missing file, path outside itself."""


def require(module: str, extra: str) -> None:
    """Raise `MDNetError` naming the extra to install when `module` is not importable."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise MDNetError(f"{module} is not installed; it comes with: pip install 'mdnet[{extra}]'")
