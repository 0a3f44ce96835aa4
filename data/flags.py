"""The parser of a command's flags: help shows every default, and a mistyped flag gets a suggestion."""
import argparse
from pathlib import Path

from data import did_you_mean, underscored


def location(text):
    """The path that a flag gives."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give a path")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """argparse with the project's habits: flags in full, with _ or -, and defaults in the help."""

    def __init__(self, prog, about):
        super().__init__(prog=prog, description=about, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(self, flag, help, **kind):
        """Add a flag, and its default to its help, unless the help names one itself."""
        default = "off" if kind.get("action") == "store_true" else kind.get("default")
        default = "none" if default in (None, "") else default
        said = "" if "default" in help or not flag.startswith("-") else f" (default: {default})"
        self.add_argument(flag, help=help + said, **kind)

    def parse(self, argv):
        """The parsed flags; ends the process with exit code 2 and a sentence about the first that is wrong."""
        args, unknown = self.parse_known_args(underscored(argv))
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            self.error(f"there is no {unknown[0]}{did_you_mean(unknown[0].partition('=')[0], flags)}")
        return args
